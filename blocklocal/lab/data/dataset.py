"""A data set as tensors: decoded once into uint8 images and integer labels, on the training device."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from blocklocal.lab.errors import UserError

TEST_NAMES = ("test", "validation", "val")  # names of the test split; the first one found is used


@dataclass(frozen=True)
class Split:
    """Inputs and labels of samples: images uint8 (N, C, H, W), windows of tokens int64 (N, T), or rows of a table
    (N, F). labels: int64 (N,), or (N, T) for windows; for numbers to predict (N, 1)."""

    inputs: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def sample(self, size: int) -> Split:
        return self.of(sample(len(self), size=size))

    def of(self, rows: Tensor) -> Split:
        """The samples of these rows, given by index or as a mask."""
        return Split(self.inputs[rows], self.labels[rows])

    def to(self, device: torch.device) -> Split:
        return Split(self.inputs.to(device), self.labels.to(device))


@dataclass(frozen=True)
class Dataset:
    """A training and a test split. classes: names, indexed by label; none if numbers are to be predicted. validation:
    samples held out of the training split, if any. digest: of what was loaded, see `digest`; None without data."""

    name: str
    classes: tuple[str, ...]
    train: Split
    test: Split
    validation: Split | None = None
    digest: str | None = None

    @property
    def channels(self) -> int:
        return self.train.inputs.shape[1]

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self.train.inputs.shape[2], self.train.inputs.shape[3]

    def to(self, device: torch.device) -> Dataset:
        validation = self.validation and self.validation.to(device)
        return replace(self, train=self.train.to(device), test=self.test.to(device), validation=validation)

    def hold_out(self, samples: int) -> Dataset:
        """Move this number of training samples, always the same ones, to the validation split.

        UserError: fewer than two would be left to train on.
        """
        if not samples:
            return self
        if samples > len(self.train) - 2:
            raise UserError(f"--validation {samples} leaves nothing of {len(self.train)} samples to train on: lower it")
        held_out = torch.zeros(len(self.train), dtype=torch.bool)
        held_out[sample(len(self.train), size=samples)] = True
        return replace(self, train=self.train.of(~held_out), validation=self.train.of(held_out))


@dataclass(frozen=True)
class Sizes:
    """Number of samples to keep of each split; 0: all. The sample is drawn before any image is decoded."""

    train: int = 0
    test: int = 0


def digest(*tensors: Tensor) -> str:
    """The SHA-256 digest of the values of tensors, one after another, in hexadecimal digits.

    >>> digest(torch.tensor([1, 2])) == digest(torch.tensor([1]), torch.tensor([2])) != digest(torch.tensor([2, 1]))
    True
    """
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(tensor.cpu().flatten().numpy().data)
    return found.hexdigest()


def sample(samples: int, *, size: int) -> Tensor:
    """The indices of a sample of this size, in order: always the same ones; all for size 0.

    UserError: there are fewer than that.
    """
    if size > samples:
        raise UserError(f"a sample of {size} from {samples}: lower --train-size or --test-size")
    if not size:
        return torch.arange(samples)
    return torch.randperm(samples, generator=torch.Generator().manual_seed(0))[:size].sort().values
