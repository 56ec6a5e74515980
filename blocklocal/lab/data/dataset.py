"""A data set as tensors: decoded once into uint8 images and integer labels, on the training device."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from blocklocal.lab.errors import UserError

TEST_NAMES = ("test", "validation", "val")  # names of the test split; the first one found is used


@dataclass(frozen=True)
class Split:
    """Images and labels. images: uint8 (N, C, H, W). labels: int64 (N,)."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def sample(self, size: int) -> Split:
        return self.of(sample(len(self), size=size))

    def of(self, rows: Tensor) -> Split:
        """The images of these rows, given by index or as a mask."""
        return Split(self.images[rows], self.labels[rows])

    def to(self, device: torch.device) -> Split:
        return Split(self.images.to(device), self.labels.to(device))


@dataclass(frozen=True)
class Dataset:
    """A training and a test split. classes: names, indexed by label. validation: images held out of the training
    split, if any."""

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
        """What config.json of a run records about its data, as plain values."""
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
        """Move this number of training images, always the same ones, to the validation split.

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
    """Number of images to keep of each split; 0: all. The sample is drawn before any image is decoded."""

    train: int = 0
    test: int = 0


def sample(images: int, *, size: int) -> Tensor:
    """The indices of a sample of `size` images, in order: always the same ones; all images for size 0.

    UserError: there are fewer images than that.
    """
    if size > images:
        raise UserError(f"a sample of {size} images from {images}: lower --train-size or --test-size")
    if not size:
        return torch.arange(images)
    return torch.randperm(images, generator=torch.Generator().manual_seed(0))[:size].sort().values
