"""A data set as tensors: decoded once into uint8 images and integer labels, on the device that trains."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from blocklocal.lab.errors import UserError

TEST_NAMES = ("test", "validation", "val")  # of the test split: the first one that is there


@dataclass(frozen=True)
class Split:
    """images: uint8 (N, C, H, W). labels: int64 (N,)."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def sample(self, size: int) -> Split:
        return self.of(sample(len(self), size=size))

    def of(self, rows: Tensor) -> Split:
        """The images of these rows, by their numbers or a mask."""
        return Split(self.images[rows], self.labels[rows])

    def to(self, device: torch.device) -> Split:
        return Split(self.images.to(device), self.labels.to(device))


@dataclass(frozen=True)
class Dataset:
    """A training and a test split. classes: names, the index being the label. validation: images that were held out of
    the training split; none where nothing was."""

    name: str
    classes: tuple[str, ...]
    train: Split
    test: Split
    validation: Split | None = None

    @property
    def channels(self) -> int:
        return self.train.images.shape[1]

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self.train.images.shape[2], self.train.images.shape[3]

    @property
    def facts(self) -> dict[str, Any]:
        """What config.json of a run says of its data, as plain values."""
        held_out = {"validation_images": len(self.validation)} if self.validation else {}
        return {
            "training_images": len(self.train),
            **held_out,
            "test_images": len(self.test),
            "shape": [self.channels, *self.size],
            "classes": list(self.classes),
        }

    def to(self, device: torch.device) -> Dataset:
        validation = self.validation and self.validation.to(device)
        return replace(self, train=self.train.to(device), test=self.test.to(device), validation=validation)

    def hold_out(self, images: int) -> Dataset:
        """With so many of the training images as the validation split, always the same ones, and not trained on.

        UserError: fewer than two would be left to train on.
        """
        if not images:
            return self
        if images > len(self.train) - 2:
            raise UserError(f"--validation {images} leaves nothing of {len(self.train)} images to train on: lower it")
        held_out = torch.zeros(len(self.train), dtype=torch.bool)
        held_out[sample(len(self.train), size=images)] = True
        return replace(self, train=self.train.of(~held_out), validation=self.train.of(held_out))


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


def load(name: str, *, train_size: int = 0, test_size: int = 0, validation: int = 0) -> Dataset:
    """The data set of that name: `digits`, a hub name of `sources.HUB`, `hf:OWNER/NAME`, or a folder.

    train_size, test_size: keep a sample of so many images, see `sample`. validation: hold out so many training images,
    see `Dataset.hold_out`.
    UserError: no such data set or folder, files that cannot be read, images or labels that do not fit together.
    """
    from blocklocal.lab.data import sources  # here, since reading files and hub needs packages that `Dataset` does not

    sizes = Sizes(train_size, test_size)
    if name == "digits":
        dataset = sources.digits(sizes)
    elif name in sources.HUB:
        dataset = sources.hub(sources.HUB[name], sizes)
    elif re.fullmatch(r"hf:\w[\w.-]*/\w[\w.-]*", name):  # a path would be taken for a folder of this machine
        dataset = sources.hub(name.removeprefix("hf:"), sizes)
    elif os.path.isdir(name):
        dataset = sources.folder(Path(name), sizes)
    elif os.path.exists(name):
        raise UserError(f"data {name!r} is a file: name the folder that holds train-*.parquet or train/CLASS/ images")
    else:
        known = ", ".join(["digits", *sources.HUB])
        raise UserError(f"unknown data {name!r}: neither one of {known}, nor hf:OWNER/NAME, nor an existing folder")
    return _checked(replace(dataset, name=name).hold_out(validation))


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
    if len(dataset.train.labels.unique()) < 2:
        only = dataset.classes[int(dataset.train.labels[0])]
        raise UserError(f"data {dataset.name!r}: all training images are of class {only!r}, two classes are needed")
    return dataset


def _splits(dataset: Dataset) -> tuple[tuple[str, Split], tuple[str, Split]]:
    return ("train", dataset.train), ("test", dataset.test)
