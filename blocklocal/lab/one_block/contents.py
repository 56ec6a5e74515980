"""What a cache of activations holds, and how it is divided into files."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
FEATURES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""The dtypes of activations that can be stored."""
TARGETS = {"int64": torch.int64, "float32": torch.float32}


@dataclass(frozen=True)
class Part:
    """A view of the training samples, or all test or validation samples, in batches of `batch`; the last of these may
    be smaller."""

    name: str
    samples: int
    batch: int

    @property
    def batches(self) -> int:
        return math.ceil(self.samples / self.batch)


@dataclass(frozen=True)
class Shard:
    """A file with batches `first` to `first + batches - 1` of a part, and their first sample."""

    file: str
    part: Part
    first: int
    batches: int

    @property
    def begin(self) -> int:
        return self.first * self.part.batch

    @property
    def samples(self) -> int:
        return min(self.batches * self.part.batch, self.part.samples - self.begin)


@dataclass(frozen=True)
class Contents:
    """The activations behind block `border`, with their targets.

    dtype: in which they are stored. features: in which the block gives them. shape, targets: of one sample. parts: see
    `Part`; the training samples come as view-1, view-2, ..., in the batches of epoch 1, 2, ... file_bytes: the size of
    a file, at most, unless a batch is larger. settings, data: of the run, see config.json. blocks: digests of the
    weights of blocks 0 to `border`. upstream: digest of the cache that block `border` has read. target_dtype: whole
    numbers for labels, else numbers.
    """

    border: int
    dtype: Literal["fp32", "bf16"]
    features: Literal["float32", "bfloat16", "float16"]
    shape: tuple[int, ...]
    targets: tuple[int, ...]
    parts: tuple[Part, ...]
    file_bytes: int
    settings: dict[str, Any]
    data: dict[str, Any]
    blocks: tuple[str, ...]
    upstream: str | None
    target_dtype: Literal["int64", "float32"] = "int64"

    @property
    def views(self) -> int:
        return sum(part.name.startswith("view-") for part in self.parts)

    def part(self, name: str) -> Part:
        return next(part for part in self.parts if part.name == name)

    @property
    def sample_bytes(self) -> int:
        features = math.prod(self.shape) * DTYPES[self.dtype].itemsize
        return features + math.prod(self.targets) * TARGETS[self.target_dtype].itemsize

    @property
    def bytes(self) -> int:
        """The size of all files, without their headers."""
        return sum(part.samples for part in self.parts) * self.sample_bytes

    def shards(self, part: Part) -> Iterator[Shard]:
        """The files of a part, in order."""
        step = max(1, self.file_bytes // max(self.sample_bytes * part.batch, 1))
        for i, first in enumerate(range(0, part.batches, step)):
            yield Shard(f"{part.name}-{i:05}.safetensors", part, first, min(step, part.batches - first))

    def all_shards(self) -> list[Shard]:
        return [shard for part in self.parts for shard in self.shards(part)]

    def plain(self) -> dict[str, Any]:
        """As plain values of JSON."""
        return json.loads(json.dumps(asdict(self)))


def checksum(content: Any) -> str:
    """The digest of plain values."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
