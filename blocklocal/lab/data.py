"""A data set as tensors: decoded once into uint8 images and integer labels, on the device that trains."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from blocklocal.lab.errors import UserError


@dataclass(frozen=True)
class Split:
    """images: uint8 (N, C, H, W). labels: int64 (N,)."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def sample(self, size: int) -> Split:
        kept = sample(len(self), size=size)
        return Split(self.images[kept], self.labels[kept])

    def to(self, device: torch.device) -> Split:
        return Split(self.images.to(device), self.labels.to(device))


@dataclass(frozen=True)
class Dataset:
    """A training and a test split. classes: names, the index being the label."""

    name: str
    classes: tuple[str, ...]
    train: Split
    test: Split

    @property
    def channels(self) -> int:
        return self.train.images.shape[1]

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self.train.images.shape[2], self.train.images.shape[3]

    def to(self, device: torch.device) -> Dataset:
        return replace(self, train=self.train.to(device), test=self.test.to(device))


@dataclass(frozen=True)
class Sizes:
    """How many images of a split to keep, 0 being all. They are drawn before any image is decoded."""

    train: int = 0
    test: int = 0


def sample(images: int, *, size: int) -> Tensor:
    """Which of so many images a sample of `size` keeps, in their order: always the same ones, all for size 0.

    UserError: fewer images than that.
    """
    if size > images:
        raise UserError(f"a sample of {size} images from {images}: lower --train-size or --test-size")
    if not size:
        return torch.arange(images)
    return torch.randperm(images, generator=torch.Generator().manual_seed(0))[:size].sort().values


def load(name: str, *, train_size: int = 0, test_size: int = 0) -> Dataset:
    """The data set of that name: `digits`, a hub name of `sources.HUB`, `hf:OWNER/NAME`, or a folder.

    train_size, test_size: keep a sample of so many images, see `sample`.
    UserError: no such data set or folder, files that cannot be read, images or labels that do not fit together.
    """
    from blocklocal.lab import sources  # here, since reading files and hub needs packages that `Dataset` does not

    sizes = Sizes(train_size, test_size)
    if name == "digits":
        dataset = sources.digits(sizes)
    elif name in sources.HUB:
        dataset = sources.hub(sources.HUB[name], sizes)
    elif name.startswith("hf:") and name != "hf:":
        dataset = sources.hub(name.removeprefix("hf:"), sizes)
    elif Path(name).is_dir():
        dataset = sources.folder(Path(name), sizes)
    elif Path(name).exists():
        raise UserError(f"data {name!r} is a file: name the folder that holds train-*.parquet or train/CLASS/ images")
    else:
        known = ", ".join(["digits", *sources.HUB])
        raise UserError(f"unknown data {name!r}: neither one of {known}, nor hf:OWNER/NAME, nor an existing folder")
    return _checked(replace(dataset, name=name))


def _checked(dataset: Dataset) -> Dataset:
    shapes = {part: tuple(split.images.shape[1:]) for part, split in _splits(dataset)}
    if shapes["train"] != shapes["test"]:
        raise UserError(
            f"data {dataset.name!r}: training images have shape {shapes['train']} and test images {shapes['test']} "
            "(channels, height, width); bring them to one shape"
        )
    for part, split in _splits(dataset):
        outside = (split.labels < 0) | (split.labels >= len(dataset.classes))
        if outside.any():
            row = int(outside.nonzero()[0])
            raise UserError(
                f"data {dataset.name!r}: label {int(split.labels[row])} of {part} image {row} is out of range, "
                f"labels are 0 to {len(dataset.classes) - 1}"
            )
    return dataset


def _splits(dataset: Dataset) -> tuple[tuple[str, Split], tuple[str, Split]]:
    return ("train", dataset.train), ("test", dataset.test)
