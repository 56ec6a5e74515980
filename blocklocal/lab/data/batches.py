"""Batches from tensors: the order and augmentation of an epoch are drawn at once and depend only on (seed, epoch).

Flip, crop and choice of images are one gather from the uint8 images on their device, without synchronisation. The
global random state is neither read nor changed. Numbers are drawn on the CPU, so every device gets the same batches.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from blocklocal.lab.data.dataset import Split


@dataclass(frozen=True)
class Augmentation:
    """Augmentation of training images. flip: mirror left and right with probability 1/2. crop: largest shift in pixels,
    edges reflected. cutout: side in pixels of a square set to the mean colour, its centre anywhere."""

    flip: bool = False
    crop: int = 0
    cutout: int = 0


@dataclass(frozen=True)
class Normalisation:
    """Normalisation of the channels. mean, std: (C, 1, 1) in units of uint8 pixels."""

    mean: Tensor
    std: Tensor

    @staticmethod
    def of(images: Tensor) -> Normalisation:
        """The channels' mean and standard deviation over uint8 images (N, C, H, W), exact, from their histograms."""
        values = torch.arange(256, dtype=torch.float64, device=images.device)
        counts = torch.stack([channel.flatten().bincount(minlength=256) for channel in images.transpose(0, 1)])
        share = counts.double() / counts.sum(1, keepdim=True)
        mean = share @ values
        std = (share @ values.square() - mean.square()).clamp_min(0).sqrt()
        std = torch.where(std > 0, std, torch.ones_like(std))  # a constant channel becomes zero
        return Normalisation(*(moment.float().reshape(-1, 1, 1) for moment in (mean, std)))

    def __call__(self, images: Tensor) -> Tensor:
        return (images.float() - self.mean) / self.std

    def to(self, device: torch.device) -> Normalisation:
        return Normalisation(self.mean.to(device), self.std.to(device))


def training_batches(
    split: Split,
    *,
    normalisation: Normalisation,
    size: int,
    seed: int,
    epoch: int,
    augmentation: Augmentation = Augmentation(),
    begin: int = 0,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches (x, y) of `size` images, in the epoch's order; images after the last full batch are left out.

    begin: number of batches to skip at the start.
    """
    n, _, height, width = split.inputs.shape
    device = split.inputs.device
    draws = epoch_draws(seed, epoch)
    order = torch.randperm(n, generator=draws)
    flips = torch.rand(n, generator=draws) < 0.5
    shifts = torch.randint(-augmentation.crop, augmentation.crop + 1, (2, n), generator=draws)
    centres = (torch.rand(2, n, generator=draws) * torch.tensor([[height], [width]])).long()
    order, flips, shifts, centres = (draw.to(device, non_blocking=True) for draw in (order, flips, shifts, centres))
    for first in range(begin * size, n - size + 1, size):
        batch = slice(first, first + size)
        rows = torch.arange(height, device=device) + shifts[0, batch, None]
        columns = torch.arange(width, device=device) + shifts[1, batch, None]
        if augmentation.flip:
            columns = torch.where(flips[batch, None], width - 1 - columns, columns)
        x = normalisation(_gather(split.inputs, order[batch], _reflect(rows, height), _reflect(columns, width)))
        if augmentation.cutout:
            x = x.masked_fill(_square(centres[:, batch], height, width, side=augmentation.cutout), 0.0)
        yield x, split.labels[order[batch]]


def epoch_order(samples: int, *, seed: int, epoch: int) -> Tensor:
    """The order (samples,) in which an epoch goes through the samples."""
    return torch.randperm(samples, generator=epoch_draws(seed, epoch))


def epoch_draws(seed: int, epoch: int) -> torch.Generator:
    """The random numbers of an epoch."""
    mixed = int(np.random.SeedSequence((seed, epoch)).generate_state(1, np.uint64)[0] >> np.uint64(1))
    return torch.Generator().manual_seed(mixed)


def _gather(images: Tensor, index: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """The pixels (B, C, H, W) of images (N, C, H, W) at index (B,), rows (B, H) and columns (B, W)."""
    channels = torch.arange(images.shape[1], device=images.device)
    return images[
        index[:, None, None, None], channels[:, None, None], rows[:, None, :, None], columns[:, None, None, :]
    ]


def _reflect(index: Tensor, size: int) -> Tensor:
    """The indices, with those below 0 or above size - 1 mirrored at the edge pixel."""
    return (size - 1) - ((size - 1) - index.abs()).abs()


def _square(centres: Tensor, height: int, width: int, *, side: int) -> Tensor:
    """Mask (B, 1, H, W) of squares with this side around centres (2, B)."""
    rows = torch.arange(height, device=centres.device) - centres[0, :, None] + side // 2
    columns = torch.arange(width, device=centres.device) - centres[1, :, None] + side // 2
    inside = ((rows >= 0) & (rows < side))[:, :, None] & ((columns >= 0) & (columns < side))[:, None, :]
    return inside[:, None]
