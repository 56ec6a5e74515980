"""Memory in files, for a model that is built and tried whole before its blocks leave one by one."""

from __future__ import annotations

import os
import shutil
import tempfile
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
EMPTY = ("aten::empty", "aten::new_empty")  # operations that give no values
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
        arguments = list(tensors((args, kwargs)))
        given = [tensor for tensor in arguments if _large(tensor)]
        there = {tensor.untyped_storage().data_ptr() for tensor in given}
        output = func(*args, **(kwargs or {}))
        returned = [tensor for tensor in tensors(output) if not any(tensor is argument for argument in arguments)]
        if all(map(_plain, arguments)):  # otherwise what is returned may be a part of them
            made = [t for t in returned if _large(t) and t.untyped_storage().data_ptr() not in there]
            self._move(made, empty=func.name().startswith(EMPTY))
        self._touched += sum(tensor.nbytes for tensor in (*given, *filter(_large, returned)))
        if self._touched > RESIDENT:
            self._give_back()
        return output

    def _move(self, made: list[Tensor], *, empty: bool) -> None:
        """Move new tensors to files; those that share memory still share it afterwards. empty: they have no values."""
        moved: dict[int, UntypedStorage] = {}
        for tensor in made:
            old = tensor.untyped_storage()
            if old.data_ptr() not in moved:
                moved[old.data_ptr()] = self._moved(old, empty=empty)
            fresh = torch.empty(0, dtype=tensor.dtype)
            shape = tensor.storage_offset(), tensor.shape, tensor.stride()
            tensor.data = fresh.set_(moved[old.data_ptr()], *shape)  # pyright: ignore[reportArgumentType] (its stub)

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


def _plain(tensor: Tensor) -> bool:
    """Whether a tensor is nothing but numbers in memory of its own or of another."""
    special = tensor.is_quantized or tensor.is_nested or tensor.is_conj() or tensor.is_neg()
    return tensor.layout is torch.strided and not special and type(tensor.data) is Tensor


def _large(tensor: Tensor) -> bool:
    """Whether a tensor is worth a file."""
    return _plain(tensor) and tensor.device.type == "cpu" and tensor.untyped_storage().nbytes() >= LARGE
