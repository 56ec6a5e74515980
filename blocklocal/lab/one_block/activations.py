"""Stored activations, read back in batches: what a block is trained on without the blocks before it."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, TypedDict

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from blocklocal.lab.data.batches import epoch_order
from blocklocal.lab.errors import UserError
from blocklocal.lab.one_block.contents import FEATURES, Contents, Part, Shard, checksum
from blocklocal.lab.runs import schema
from blocklocal.lab.settings import Settings
from blocklocal.lab.tasks.task import Batch

INDEX, PLAN = "index.json", "plan.json"  # of a whole cache, and of one that is being written
FORMAT = 1


class File(TypedDict):
    bytes: int
    sha256: str


class Index(TypedDict):
    """index.json."""

    format: int
    contents: Contents
    files: dict[str, File]
    checksum: str


class Activations:
    """The cache in a folder. UserError: there is none, it is not whole, or a file of it is missing or truncated.

    A file is compared with its digest when it is read first.
    """

    def __init__(self, path: Path, *, device: torch.device | None = None) -> None:
        self.path, self.device = path, device or torch.device("cpu")
        index = _read_index(path)
        self.digest = index["checksum"]
        self.files: dict[str, File] = index["files"]
        try:
            self.contents = schema.convert_to(index["contents"], Contents)
            missing = [shard.file for shard in self.contents.all_shards() if shard.file not in self.files]
            if missing:
                raise ValueError(f"files: {missing[0]!r} is missing")
        except ValueError as error:
            raise _damaged(path / INDEX, str(error)) from error
        for name, file in self.files.items():
            try:
                size = os.stat(path / name).st_size
            except OSError as error:
                raise _damaged(path / name, error.strerror or str(error)) from error
            if size != file["bytes"]:
                raise _damaged(path / name, f"it has {size:,} bytes instead of {file['bytes']:,}")
        self._known: dict[str, dict[str, Tensor]] = {}

    @cached_property
    def settings(self) -> Settings:
        """The settings of the run whose blocks gave these activations. UserError: of another version."""
        return schema.settings_of(self.contents.settings, file=self.path / INDEX)

    @property
    def steps(self) -> int:
        """Batches of a view."""
        return self.contents.part("view-1").batches

    def training(self, epoch: int, *, begin: int = 0) -> Iterator[Batch]:
        """The batches of epoch 1, 2, ..., from batch `begin` on.

        An epoch has the samples of view (epoch - 1) mod V: the first V epochs in their own batches, a later one in an
        order that (seed, epoch) draws.
        """
        part = self.contents.part(f"view-{(epoch - 1) % self.contents.views + 1}")
        if epoch <= self.contents.views:
            yield from self._in_order(part, begin=begin)
            return
        order = epoch_order(part.samples, seed=self.settings.seed, epoch=epoch)
        for rows in order[begin * part.batch :].split(part.batch):
            yield self._gather(part, rows)

    def ordered(self, name: str, *, begin: int = 0) -> Iterator[Batch]:
        """The batches of "test" or "validation"."""
        yield from self._in_order(self.contents.part(name), begin=begin)

    def has(self, name: str) -> bool:
        """Whether there is a part of that name."""
        return any(part.name == name for part in self.contents.parts)

    def _in_order(self, part: Part, *, begin: int) -> Iterator[Batch]:
        for shard in self.contents.shards(part):
            if begin < shard.first + shard.batches:
                tensors = self._load(shard)
                first = max(begin - shard.first, 0) * part.batch
                for h, y in zip(*(tensors[name][first:].split(part.batch) for name in ("h", "y")), strict=True):
                    yield self._placed(h, y)

    def _gather(self, part: Part, rows: Tensor) -> Batch:
        shards = list(self.contents.shards(part))
        begins = torch.tensor([shard.begin for shard in shards])
        owner = torch.searchsorted(begins, rows, right=True) - 1
        found: list[Tensor] = []
        for name in ("h", "y"):
            stored = [(owner == i, self._load(shards[i])[name], shards[i].begin) for i in owner.unique().tolist()]
            rows_of = torch.empty(len(rows), *stored[0][1].shape[1:], dtype=stored[0][1].dtype)
            for here, tensor, begin in stored:
                rows_of[here] = tensor[rows[here] - begin]
            found.append(rows_of)
        return self._placed(*found)

    def _placed(self, h: Tensor, y: Tensor) -> Batch:
        dtype = FEATURES[self.contents.features]
        return h.to(self.device, dtype, copy=True), y.to(self.device, copy=True)

    def _load(self, shard: Shard) -> dict[str, Tensor]:
        """The tensors of a file, mapped into memory. UserError: it is not the file that was written."""
        file, known = self.path / shard.file, self._known.get(shard.file)
        if known is not None:
            return known
        try:
            with file.open("rb") as opened:
                digest = hashlib.file_digest(opened, "sha256").hexdigest()
            if digest != self.files[shard.file]["sha256"]:
                raise ValueError("it is not the file whose sha256 is in the index")
            tensors = load_file(file)
        except (OSError, SafetensorError, ValueError) as error:
            raise _damaged(file, str(error)) from error
        self._known[shard.file] = tensors
        return tensors


def _read_index(path: Path) -> Any:
    """The content of index.json, checked against its own checksum."""
    file = path / INDEX
    if not file.exists():
        if (path / PLAN).exists():
            raise UserError(f"the cache in {str(path)!r} is not whole: run the same bll cache again to complete it")
        raise UserError(f"{str(path)!r} holds no cache of activations: bll cache RUN writes one")
    try:
        found = json.loads(schema.read(file))
        if not isinstance(found, dict) or found.get("format") != FORMAT:
            raise ValueError(f"this version reads format {FORMAT}")
        if checksum({name: found[name] for name in found if name != "checksum"}) != found.get("checksum"):
            raise ValueError("it does not have its own checksum")
    except (ValueError, RecursionError) as error:
        raise _damaged(file, str(error)) from error
    return found


def _damaged(file: Path, why: str) -> UserError:
    return UserError(
        f"{str(file)!r} is damaged ({why}): restore it from a copy, or remove the cache and write it again"
    )
