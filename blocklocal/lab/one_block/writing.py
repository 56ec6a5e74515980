"""Writes the activations behind a trained block: the same again after an interruption goes on where it was."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from blocklocal.graph import mode
from blocklocal.lab import outputs
from blocklocal.lab.errors import UserError
from blocklocal.lab.names import WORD, short
from blocklocal.lab.one_block.activations import FORMAT, INDEX, PLAN, Activations
from blocklocal.lab.one_block.contents import DTYPES, Contents, Shard, checksum
from blocklocal.lab.one_block.source import Source
from blocklocal.lab.runs import schema
from blocklocal.lab.tasks.task import Batch
from blocklocal.lab.training.experiment import Experiment
from blocklocal.messages import dense


def missing(folder: Path, contents: Contents) -> list[Shard]:
    """The files that are still to be written there. UserError: the folder holds another cache, or something else."""
    if (folder / INDEX).exists():
        _require_same(Activations(folder).contents.plain(), contents.plain(), folder=folder)
        return []
    if (folder / PLAN).exists():
        try:
            plan = json.loads(schema.read(folder / PLAN))
        except (ValueError, RecursionError) as error:
            raise UserError(f"{str(folder / PLAN)!r} cannot be read ({error}): remove the folder") from error
        _require_same(plan, contents.plain(), folder=folder)
    elif folder.is_dir() and any(not path.name.startswith(".") for path in folder.iterdir()):
        raise UserError(f"--out {str(folder)!r} is not empty and holds no cache: choose another folder")
    return [shard for shard in contents.all_shards() if not (folder / shard.file).exists()]


def check_room(folder: Path, size: int) -> int:
    """The free bytes where the folder is to be. UserError: fewer than `size`."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free
    if size > free:
        raise UserError(
            f"--out {str(folder)!r}: {gib(size)} are needed and {gib(free)} are free: make room, store fewer --views, "
            "or --dtype bf16"
        )
    return free


def write(folder: Path, contents: Contents, experiment: Experiment, source: Source) -> None:
    """Write what is missing, file by file, and the index when all are there. OSError: the disk is full, for example;
    what is whole is kept."""
    if (folder / INDEX).exists():
        return
    plan = json.dumps(contents.plain(), indent=1) + "\n"
    outputs.write(folder / PLAN, lambda path: path.write_text(plan))
    for shard in missing(folder, contents):
        batches = islice(outputs_of(experiment, contents.border, _batches(source, shard)), shard.batches)
        tensors = _joined(batches, contents=contents, samples=shard.samples)
        outputs.write(folder / shard.file, lambda path, tensors=tensors: save_file(tensors, path))
    files = {shard.file: _file(folder / shard.file) for shard in contents.all_shards()}
    content: dict[str, Any] = {"format": FORMAT, "contents": contents.plain(), "files": files}
    index = json.dumps(content | {"checksum": checksum(content)}, indent=1) + "\n"
    outputs.write(folder / INDEX, lambda path: path.write_text(index))
    (folder / PLAN).unlink()


@torch.no_grad()
def outputs_of(experiment: Experiment, k: int, batches: Iterator[Batch]) -> Iterator[Batch]:
    """What block k makes of these inputs in evaluation mode, with their targets."""
    block = experiment.learner.blocks[k]
    with mode(block, training=False):
        for h, y in batches:
            with experiment.autocast():
                yield dense(block(h)), y


def gib(size: int) -> str:
    """A number of bytes in words."""
    return f"{size / 2**30:,.2f} GiB" if size >= 2**27 else f"{size / 2**20:,.1f} MiB"


def _batches(source: Source, shard: Shard) -> Iterator[Batch]:
    name = shard.part.name
    if name.startswith("view-"):
        return source.training(int(name.removeprefix("view-")), begin=shard.first)
    return source.ordered(name, begin=shard.first)


def _joined(batches: Iterator[Batch], *, contents: Contents, samples: int) -> dict[str, Tensor]:
    """The tensors of a file. UserError: the activations are not finite, or not as the cache was planned."""
    found, targets = zip(*((h.to("cpu", DTYPES[contents.dtype]), y.cpu()) for h, y in batches), strict=True)
    h, y = torch.cat(found), torch.cat(targets)
    assert (*h.shape, *y.shape) == (samples, *contents.shape, samples, *contents.targets)
    if not h.isfinite().all():
        raise UserError(f"block {contents.border} gives activations that are not finite in {contents.dtype}")
    return {"h": h.contiguous(), "y": y.contiguous()}


def _file(path: Path) -> dict[str, Any]:
    with path.open("rb") as opened:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(opened, "sha256").hexdigest()}


def _require_same(there: Any, wanted: dict[str, Any], *, folder: Path) -> None:
    """UserError: names the first difference."""
    for name, value in wanted.items():
        found = there.get(name) if isinstance(there, dict) else None
        if found != value:
            values = ", ".join(short(str(one), longest=WORD) for one in (found, value))
            raise UserError(
                f"--out {str(folder)!r} already holds another cache ({name} differs: {values}): choose another folder"
            )
