"""Memory in files, for a model that is built and tried whole before its blocks leave one by one."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, UntypedStorage

from blocklocal.internals import OperationMode
from blocklocal.lab import outputs
from blocklocal.lab.environment import give_back_freed_memory, give_back_pages
from blocklocal.lab.errors import UserError
from blocklocal.values import tensors

LARGE = 2**20  # bytes of a tensor that is worth a file
RESIDENT = 2**26  # bytes that operations read and write before their pages are given back


class FileMemory(OperationMode):
    """While it is active, large tensors that operations make on the CPU have their memory in files.

    The files are mapped, so all operations compute the same to the bit. Now and then the pages of all are given back to
    the system, which reads them again where they are needed. The files have no names: nothing is left of them, whatever
    ends the process, and the room of each is free again once its last tensor is gone, be this active or not.

    folder: on the disk that is to hold them; it need not exist yet. UserError: the disk is full.

    >>> with FileMemory(Path("runs/large")):
    ...     layer = torch.nn.Linear(2048, 2048)
    >>> layer(torch.zeros(1, 2048)).shape
    torch.Size([1, 2048])
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._folder = next(path for path in (folder, *folder.absolute().parents) if path.is_dir())
        self._mapped = WeakSet[UntypedStorage]()
        self._touched = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = list(_large((args, kwargs)))
        places = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in given}
        output = func(*args, **(kwargs or {}))
        made = [tensor for tensor in _large(output) if not any(tensor is argument for argument in given)]
        for tensor in made:
            old = tensor.untyped_storage()
            if old.data_ptr() not in places:
                places[old.data_ptr()] = self._moved(old, empty="empty" in func.name())
            fresh = torch.empty(0, dtype=tensor.dtype)
            shape = tensor.storage_offset(), tensor.shape, tensor.stride()
            tensor.data = fresh.set_(places[old.data_ptr()], *shape)  # pyright: ignore[reportArgumentType] (its stub)
        self._touched += sum(tensor.nbytes for tensor in (*given, *made))
        if self._touched > RESIDENT:
            self._give_back()
        return output

    def _moved(self, old: UntypedStorage, *, empty: bool) -> UntypedStorage:
        """The same values in a file. empty: there are none yet."""
        size = old.nbytes()
        try:
            with tempfile.TemporaryFile(dir=self._folder) as file:
                if hasattr(os, "posix_fallocate"):  # without room, writing into the memory would end the process
                    os.posix_fallocate(file.fileno(), 0, size)
                name = f"/dev/fd/{file.fileno()}"
                new = torch.from_file(name, shared=True, size=size, dtype=torch.uint8).untyped_storage()
        except OSError as error:
            free = shutil.disk_usage(self._folder).free
            raise UserError(
                f"--offload: {str(self._folder)!r} cannot hold the model while it is built ({outputs.reason(error)}; "
                f"{free / 2**20:,.0f} MiB are free): make room, or name a folder of another disk, disk:FOLDER"
            ) from error
        if not empty:
            new.copy_(old)
        self._mapped.add(new)
        return new

    def _give_back(self) -> None:
        for storage in self._mapped:
            give_back_pages(storage.data_ptr(), storage.nbytes())
        give_back_freed_memory()
        self._touched = 0


def _large(value: object) -> Iterator[Tensor]:
    """The tensors in a value that are worth a file."""
    for tensor in tensors(value):
        plain = tensor.device.type == "cpu" and tensor.layout is torch.strided and type(tensor.data) is Tensor
        if plain and not tensor.is_quantized and tensor.untyped_storage().nbytes() >= LARGE:
            yield tensor
