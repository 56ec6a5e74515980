"""Data and learner of a run, made from its settings: what training and testing share."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from blocklocal import BlockLocal
from blocklocal.lab import batches, models, rules
from blocklocal.lab.batches import Augmentation, Normalisation
from blocklocal.lab.config import Settings
from blocklocal.lab.data import Dataset, load
from blocklocal.lab.environment import find_device
from blocklocal.lab.errors import UserError
from blocklocal.lab.evaluate import Exits, evaluate

EXAMPLE = 8  # images by which the blocks are balanced and the borders get their shapes
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Experiment:
    """A data set, and a model with its initial weights under a learning rule, both on `device`."""

    settings: Settings
    device: torch.device
    dataset: Dataset
    normalisation: Normalisation
    learning: rules.Learning

    @property
    def learner(self) -> BlockLocal:
        return self.learning.learner

    def training_batches(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        settings = self.settings
        return batches.training_batches(
            self.dataset.train,
            normalisation=self.normalisation,
            size=settings.batch_size,
            seed=settings.seed,
            epoch=epoch,
            augmentation=Augmentation(flip=settings.flip, crop=settings.crop, cutout=settings.cutout),
        )

    def autocast(self) -> torch.autocast:
        dtype = DTYPES[self.settings.dtype]
        return torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32)

    def test(self) -> Exits:
        """All exits on the test images."""
        with self.autocast():
            return evaluate(self.learner, self.dataset.test, normalisation=self.normalisation)

    def angles(self, x: Tensor, y: Tensor) -> dict[str, float]:
        """Degrees between the rule's gradient and the true one, by layer; none where the rule follows the true one."""
        alignment = self.learning.alignment
        return {} if alignment is None else alignment.angles(x, y, criterion=self.learner.criterion)

    def state_dict(self) -> dict[str, Any]:
        alignment = self.learning.alignment
        return {"learner": self.learner.state_dict(), "alignment": alignment.state_dict() if alignment else None}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """UserError: the state of another model."""
        try:
            self.learner.load_state_dict(state["learner"])
            if self.learning.alignment:
                self.learning.alignment.load_state_dict(state["alignment"])
        except (RuntimeError, ValueError) as error:
            raise UserError(
                f"the checkpoint does not fit model {self.settings.model!r} as it is built now: "
                f"give back the code that it was trained with, or train anew ({error})"
            ) from error


def prepare(settings: Settings) -> Experiment:
    """The experiment of these settings.

    UserError: an unknown device, data set, model or rule; too few images; a model that cannot be cut as asked.
    """
    settings.check()
    rules.find(settings.rule)
    device = find_device(settings.device)
    if settings.threads:
        torch.set_num_threads(settings.threads)
    dataset = load(settings.data, train_size=settings.train_size, test_size=settings.test_size).to(device)
    images = len(dataset.train)
    if images < settings.batch_size:
        raise UserError(f"--batch-size {settings.batch_size} is more than the {images} training images")
    if settings.crop >= min(dataset.size):
        raise UserError(f"--crop {settings.crop} is not less than the {min(dataset.size)} pixels of an image's side")
    normalisation = Normalisation.of(dataset.train.images)
    torch.manual_seed(settings.seed)
    model = models.build(settings.model, channels=dataset.channels, size=dataset.size, classes=len(dataset.classes))
    task = rules.Task(
        classes=len(dataset.classes),
        example=normalisation(dataset.train.images[:EXAMPLE]),
        blocks=settings.blocks,
        at=settings.at or models.CUTS.get((settings.model, settings.blocks)),
        criterion=partial(cross_entropy, label_smoothing=settings.label_smoothing),
        seed=settings.seed,
    )
    if settings.channels_last:
        model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    learning = rules.apply(settings.rule, model.to(device), task)
    if settings.channels_last:  # the heads at the borders too
        learning.learner.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    return Experiment(settings, device, dataset, normalisation, learning)
