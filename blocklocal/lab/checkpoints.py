"""Checkpoints of a run: a part per block, written beside the training by whoever trains the block."""

from __future__ import annotations

import pickle
import shutil
import warnings
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from blocklocal.lab.errors import UserError
from blocklocal.lab.runs import Run

METADATA = ".metadata"  # of a part: written last and by renaming, so a part is whole where it is there

# All that the metadata of tensors consists of. Whatever else a file wants to make when it is read is refused.
HARMLESS = {
    "torch": {"Size", *(name for name in dir(torch) if isinstance(getattr(torch, name), torch.dtype))},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.metadata": {
        *("Metadata", "MetadataIndex", "StorageMeta", "TensorStorageMetadata", "ChunkStorageMetadata"),
        *("TensorProperties", "_MEM_FORMAT_ENCODING"),
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "pathlib": {"Path", "PosixPath", "PurePosixPath", "WindowsPath"},
}

UNREADABLE = (OSError, RuntimeError, ValueError, KeyError, EOFError, pickle.UnpicklingError, CheckpointException)

# A part has one writer, as it should be. For good, since warnings are set for all threads at once.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")

State = dict[str, Tensor]


class Checkpoints:
    """The folders step-N/block-K below `path`, N being the number of minibatches that the block has learnt from.

    Step N is a consistent cut once the parts of all blocks are whole: a block needs nothing from another but messages,
    and these follow from the data. So no process waits for another to save. Of whole cuts the last is kept.
    """

    def __init__(self, path: Path, *, blocks: int) -> None:
        self.path, self.blocks = path, blocks
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None

    def save(self, step: int, parts: Mapping[int, State]) -> None:
        """Copy the states of some blocks and write them while training goes on; first wait for those before.

        What cannot be written is a warning, and leaves nothing behind: the last whole cut stays.
        """
        self.wait()
        copies = {k: {name: tensor.detach().to("cpu", copy=True) for name, tensor in parts[k].items()} for k in parts}
        self._pending = self._writer.submit(self._write, step, copies)

    def wait(self) -> None:
        """Until what was to be saved is on disk, or given up."""
        pending, self._pending = self._pending, None
        try:
            if pending is not None:
                pending.result()
        except OSError as error:
            warnings.warn(f"a checkpoint was not written ({error}); training goes on", stacklevel=2)

    def latest(self) -> int | None:
        """The last whole cut; None where there is none."""
        return max((step for step in self._steps() if self._whole(step)), default=None)

    def load(self, step: int, k: int) -> State:
        """The state of block k. UserError: an unreadable part, or one that holds something else than tensors."""
        folder = self._part(step, k)
        try:
            reader = _Reader(folder)
            found = reader.read_metadata().state_dict_metadata
            other = [name for name, entry in found.items() if not isinstance(entry, TensorStorageMetadata)]
            if other:
                raise ValueError(f"{other[0]!r} is no tensor")
            state = {
                name: torch.empty(entry.size, dtype=entry.properties.dtype)
                for name, entry in found.items()
                if isinstance(entry, TensorStorageMetadata)
            }
            load(state, storage_reader=reader, no_dist=True)
        except UNREADABLE as error:
            raise UserError(
                f"{str(folder)!r} is not a readable checkpoint ({_cause(error)}); start anew with another --out"
            ) from error
        return state

    def discard_others(self, step: int | None) -> None:
        """Forget all cuts but that one: parts of later ones belong to a course of events that is given up."""
        for other in self._steps():
            if other != step:
                shutil.rmtree(self.path / f"step-{other}")

    def _write(self, step: int, parts: Mapping[int, State]) -> None:
        for k, state in parts.items():
            folder = self._part(step, k)
            try:
                save(state, storage_writer=FileSystemWriter(folder), no_dist=True)
            except (OSError, RuntimeError, CheckpointException) as error:
                shutil.rmtree(folder, ignore_errors=True)
                free = shutil.disk_usage(self.path).free / 2**20
                raise OSError(f"{folder}: {_cause(error)}; {free:,.0f} MiB are free") from error
        last = self.latest()
        for old in self._steps():
            if last is not None and old < last:
                for k in parts:
                    shutil.rmtree(self._part(old, k), ignore_errors=True)
                with suppress(OSError):  # another process has parts in it
                    (self.path / f"step-{old}").rmdir()

    def _steps(self) -> list[int]:
        names = [path.name.removeprefix("step-") for path in self.path.glob("step-*")]
        return sorted(int(name) for name in names if name.isdecimal())

    def _whole(self, step: int) -> bool:
        return all((self._part(step, k) / METADATA).exists() for k in range(self.blocks))

    def _part(self, step: int, k: int) -> Path:
        return self.path / f"step-{step}" / f"block-{k}"


def kept(run: Run) -> str:
    """What a run that was stopped can be resumed from, in words."""
    facts = run.facts()
    latest, steps = Checkpoints(run.checkpoints, blocks=facts["blocks"]).latest(), facts["steps"]
    if latest is None:
        return "no checkpoint was written yet"
    epoch, rest = divmod(latest, steps)
    place = f"epoch {epoch + 1}, step {rest} of {steps}" if rest else f"epoch {epoch}"
    return f"{str(run.path)!r} keeps the checkpoint of {place}"


class _Reader(FileSystemReader):
    """Reads the metadata of a part without making anything but what `HARMLESS` names."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with Path(self.path, METADATA).open("rb") as file:
            metadata = _Unpickler(file).load()
        if not isinstance(metadata, Metadata):
            raise pickle.UnpicklingError(f"a {type(metadata).__name__} in place of metadata")
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name not in HARMLESS.get(module, ()):
            raise pickle.UnpicklingError(f"it wants to make a {module}.{name}")
        return super().find_class(module, name)


def _cause(error: BaseException) -> str:
    """What went wrong inside, on one line."""
    inner = next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error
    return str(inner).split("\n")[0]
