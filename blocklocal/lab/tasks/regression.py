"""Regression: a number from the rows of a table."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from blocklocal.lab.data.dataset import Dataset, Split
from blocklocal.lab.errors import UserError
from blocklocal.lab.settings import Settings, flag
from blocklocal.lab.tasks.grading import NumberGrading
from blocklocal.lab.tasks.measure import RMSE
from blocklocal.lab.tasks.table import Table
from blocklocal.messages import Criterion

FOR_CLASSES = ("label_smoothing", "softness", "power", "add_beliefs")
"""Options that change distributions over classes."""


@dataclass(frozen=True)
class Standardisation:
    """Brings targets to mean 0 and deviation 1: (target - mean) / deviation, in double precision."""

    mean: float
    deviation: float

    @staticmethod
    def of(targets: Tensor) -> Standardisation:
        """That of these numbers, whatever their order and the machine. UserError: they are all the same, or too large.

        >>> Standardisation.of(Tensor([1.0, 3.0, 5.0, 7.0]))
        Standardisation(mean=4.0, deviation=2.23606797749979)
        """
        numbers = targets.double().flatten().tolist()
        try:
            mean = math.fsum(numbers) / len(numbers)
            deviation = math.sqrt(math.fsum((number - mean) * (number - mean) for number in numbers) / len(numbers))
        except OverflowError:
            mean = deviation = math.inf
        if not 0 < deviation < math.inf:
            what = "are all the same" if deviation == 0 else "are too large for their squares"
            raise UserError(f"the targets of the training rows {what}: choose another column with --target")
        return Standardisation(mean, deviation)

    def __call__(self, targets: Tensor) -> Tensor:
        return ((targets.double() - self.mean) / self.deviation).float()


class Regression(Table):
    """Rows of F numbers with one number (1,) each to predict: by mean squared error, with targets brought to mean 0 and
    deviation 1 over the training rows, and tested by the root mean squared error in the unit of the column."""

    shown = (RMSE,)

    def __init__(self, dataset: Dataset, settings: Settings, *, standardisation: Standardisation) -> None:
        super().__init__(dataset, settings)
        self.standardisation = standardisation

    @staticmethod
    def of(dataset: Dataset, settings: Settings) -> Regression:
        """A data set with its targets as they are, (N, 1). UserError: options for classes; see `Standardisation.of`."""
        for name in FOR_CLASSES:
            if getattr(settings, name) != getattr(Settings, name):
                raise UserError(
                    f"{flag(name)} is for classes, and {dataset.name!r} has a number to predict: leave it out"
                )
        scale = Standardisation.of(dataset.train.labels)

        def scaled(split: Split) -> Split:
            return replace(split, labels=scale(split.labels))

        held_out = dataset.validation and scaled(dataset.validation)
        data = replace(dataset, train=scaled(dataset.train), test=scaled(dataset.test), validation=held_out)
        return Regression(data, settings, standardisation=scale)

    @property
    def shape(self) -> str:
        return f"{self.features} numbers, one number to predict"

    @property
    def facts(self) -> dict[str, Any]:
        scale = self.standardisation
        return super().facts | {"target_mean": scale.mean, "target_deviation": scale.deviation}

    @property
    def grading(self) -> NumberGrading:
        return NumberGrading(self.standardisation.deviation)

    @property
    def sizes(self) -> dict[str, int]:
        return {"outputs": 1}

    @property
    def criterion(self) -> Criterion:
        """Mean squared error."""
        return F.mse_loss
