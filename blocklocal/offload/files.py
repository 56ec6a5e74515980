"""Blocks in files, for a machine whose memory holds one block."""

from __future__ import annotations

import json
import os
import re
import weakref
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from blocklocal.arguments import require
from blocklocal.offload.tensor_file import check, damaged, read, write
from blocklocal.offload.tree import decode, encode, outlines

try:
    import fcntl
except ImportError:  # on Windows, where no lock is held
    fcntl = None

FORMAT = 1
INDEX, LOCK, STATE = "index.json", ".lock", "state"
VERSION = re.compile(rf"((block|optimizer)-\d+|{STATE})\.\d+\.safetensors")


class FileStore:
    """Keeps blocks in a folder of its own, as safetensors files, and can be saved, to resume after any interruption.

    folder: it is made if there is none; it needs room for the weights and the optimizer's state twice. A file is
    written once and never changed: every version of a block is a new one. `save` names the present files in an index,
    which is swapped in one operation, so whatever ends the process, also in the middle of a write, the last saved state
    is whole. A written file is flushed while the next block computes, so at most one waits in memory. ValueError: a
    folder with other files in it, or in use by another process.

    >>> import tempfile
    >>> from functools import partial
    >>> import blocklocal as bll
    >>> with torch.device("meta"):  # the whole model is never in memory
    ...     blocks, example = [nn.Linear(8, 16), nn.Linear(16, 3)], torch.randn(2, 8)
    >>> learner = bll.BlockLocal(blocks, classes=3, example=example)
    >>> store = FileStore(tempfile.mkdtemp())
    >>> offloaded = learner.offload(store, optimizer=partial(torch.optim.AdamW, lr=1e-3))
    >>> x, y = torch.randn(4, 8), torch.tensor([0, 2, 1, 0])
    >>> losses = learner.backward(x, y, optimizers=offloaded.optimizers)
    >>> offloaded.save({"step": 1})
    >>> store.saved
    True
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        require(folder, str | os.PathLike, name="folder", needed="pass the path of a folder")
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        found = [path.name for path in self.folder.iterdir()]
        others = [
            name for name in found if not VERSION.fullmatch(name) and name.removesuffix(".part") not in (INDEX, LOCK)
        ]
        if others:
            raise ValueError(
                f"{str(folder)!r} holds {min(others)!r}, which is of something else: pass a folder of its own"
            )
        lock = os.open(self.folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        self._unlock = weakref.finalize(self, os.close, lock)
        if fcntl is not None:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                self._unlock()
                raise ValueError(f"{str(folder)!r} is in use by another store: wait for it, or pass another") from None
        self._files: dict[str, str] = {}  # by key, the present version
        self._kept: set[str] = set()  # the files of the last save
        self._version = 0
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="offload")
        self._flushing: Future[None] | None = None
        if not self.saved:
            self._tidy()  # of a process that ended before it saved anything

    @property
    def saved(self) -> bool:
        """Whether the folder holds a state to resume from."""
        return (self.folder / INDEX).exists()

    def put(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        self._settle()
        self._version += 1
        path = self.folder / f"{key}.{self._version}.safetensors"
        ordered = dict(sorted(tensors.items(), key=lambda item: -item[1].element_size()))
        try:
            write(path, ordered, ordered.values())
        except OSError as error:
            path.unlink(missing_ok=True)
            raise self._no_room(error, sum(tensor.nbytes for tensor in tensors.values())) from error
        before = self._files.get(key)
        self._files[key] = path.name
        self._flushing = self._writer.submit(_flush, path)
        if before is not None and before not in self._kept:
            (self.folder / before).unlink()

    def get(self, key: str, outlines: Mapping[str, Tensor], *, device: torch.device) -> dict[str, Tensor]:
        return read(self.folder / self._files[key], outlines, device=device)

    def prefetch(self, key: str, outlines: Mapping[str, Tensor], *, device: torch.device) -> None:
        """Let the system read ahead into memory that is free, so that no second block is resident."""
        if hasattr(os, "posix_fadvise"):
            with (self.folder / self._files[key]).open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)

    def save(self, state: Any) -> None:
        """ValueError: a state that is not made of tensors and plain values. OSError: it cannot be written."""
        self._settle()
        tensors: dict[str, Tensor] = {}
        encoded = encode(state, tensors)
        self._version += 1
        beside, new = self.folder / f"{STATE}.{self._version}.safetensors", self.folder / f"{INDEX}.part"
        ordered = dict(sorted(tensors.items(), key=lambda item: -item[1].element_size()))
        files = self._files | {STATE: beside.name}
        try:
            write(beside, ordered, ordered.values())
            new.write_text(json.dumps({"format": FORMAT, "version": self._version, "files": files, "state": encoded}))
            for path in (beside, new, self.folder):
                _flush(path)
            new.replace(self.folder / INDEX)
            _flush(self.folder)
        except OSError as error:
            for path in (beside, new):
                path.unlink(missing_ok=True)
            raise self._no_room(error, sum(tensor.nbytes for tensor in tensors.values())) from error
        self._kept = set(files.values())
        self._tidy()

    def resume(self) -> Any:
        """ValueError: nothing was saved, or a file is not what was written."""
        index = self.folder / INDEX
        if not self.saved:
            raise ValueError(f"{str(self.folder)!r} holds no saved state: leave resume= out to begin there")
        try:
            found = json.loads(index.read_text())
            files, version, encoded = found["files"], found["version"], found["state"]
            wanted = outlines(encoded)
            whole = found["format"] == FORMAT and all(VERSION.fullmatch(name) for name in files.values())
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise damaged(index, "no index of a FileStore") from error
        if not whole:
            raise damaged(index, f"it is not of format {FORMAT}")
        for name in files.values():
            check(self.folder / name)
        state = decode(encoded, read(self.folder / files[STATE], wanted, device=torch.device("cpu")))
        self._kept = set(files.values())
        self._files = {key: name for key, name in files.items() if key != STATE}
        self._version = version
        self._tidy()
        return state

    def close(self) -> None:
        """Wait for what is being written, and let another store use the folder."""
        self._settle()
        self._writer.shutdown()
        self._unlock()

    def _settle(self) -> None:
        """Wait for the last flush. OSError: it failed, and with it everything since the last save."""
        flushing, self._flushing = self._flushing, None
        try:
            if flushing is not None:
                flushing.result()
        except OSError as error:
            raise OSError(f"{str(self.folder)!r}: a block was lost while it was written ({error}): resume") from error

    def _tidy(self) -> None:
        """Remove files that neither the last save nor the present state names."""
        for path in self.folder.iterdir():
            if VERSION.fullmatch(path.name) and path.name not in self._kept | set(self._files.values()):
                path.unlink()

    def _no_room(self, error: Exception, needed: int) -> OSError:
        info = os.statvfs(self.folder) if hasattr(os, "statvfs") else None
        free = "" if info is None else f"; {needed / 2**20:,.0f} MiB are needed, {_free(info):,.0f} MiB are free"
        return OSError(f"{str(self.folder)!r} cannot be written ({_reason(error)}{free}): the block stays in memory")


def _flush(path: Path) -> None:
    """Flush a file or folder to disk."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error).splitlines()[0]


def _free(info: os.statvfs_result) -> float:
    return info.f_bavail * info.f_frsize / 2**20
