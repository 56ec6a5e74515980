"""Classification of images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from blocklocal.lab import models
from blocklocal.lab.data import batches
from blocklocal.lab.data.batches import Augmentation, Normalisation
from blocklocal.lab.data.dataset import Dataset
from blocklocal.lab.data.load import load
from blocklocal.lab.errors import UserError
from blocklocal.lab.settings import Settings
from blocklocal.lab.tasks.task import Batch, Task


class Images(Task):
    """Images (C, H, W) with one label each: uint8 in memory, normalised per channel, augmented while training."""

    def __init__(self, dataset: Dataset, settings: Settings, *, normalisation: Normalisation) -> None:
        super().__init__(dataset, settings)
        self.normalisation = normalisation

    @staticmethod
    def load(settings: Settings) -> Images:
        """UserError: no such data set, images that do not fit together, or an augmentation that does not fit them."""
        dataset = load(
            settings.data,
            train_size=settings.train_size,
            test_size=settings.test_size,
            validation=settings.validation,
        )
        side = min(dataset.size)
        if settings.crop >= side:
            raise UserError(f"--crop {settings.crop} is not less than the {side} pixels of an image's side")
        if settings.cutout > side:
            raise UserError(f"--cutout {settings.cutout} is more than the {side} pixels of an image's side")
        normalisation = Normalisation.of(dataset.train.inputs)  # the same numbers for every device
        return Images(dataset, settings, normalisation=normalisation)

    def to(self, device: torch.device) -> Self:
        moved = super().to(device)
        moved.normalisation = self.normalisation.to(device)
        return moved

    @property
    def shape(self) -> str:
        height, width = self.dataset.size
        return f"{self.dataset.channels}x{height}x{width}, {len(self.dataset.classes)} classes"

    @property
    def facts(self) -> dict[str, Any]:
        data = self.dataset
        return super().facts | {"shape": [data.channels, *data.size], "classes": list(data.classes)}

    def prepared(self, inputs: Tensor) -> Tensor:
        return self.normalisation(inputs)

    def training_batches(self, epoch: int, *, begin: int = 0) -> Iterator[Batch]:
        settings = self.settings
        return batches.training_batches(
            self.dataset.train,
            normalisation=self.normalisation,
            size=settings.batch_size,
            seed=settings.seed,
            epoch=epoch,
            augmentation=Augmentation(flip=settings.flip, crop=settings.crop, cutout=settings.cutout),
            begin=begin,
        )

    def build(self) -> nn.Module:
        data = self.dataset
        return models.build(
            self.settings.model,
            channels=data.channels,
            size=data.size,
            classes=len(data.classes),
            arguments=models.read_arguments(self.settings.model_args),
        )

    def cuts(self) -> Sequence[str] | None:
        return models.CUTS.get((self.settings.model, self.settings.blocks))
