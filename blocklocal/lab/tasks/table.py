"""Classification of the rows of a table."""

from __future__ import annotations

from typing import Any

from torch import nn

from blocklocal.lab import models
from blocklocal.lab.data.dataset import Dataset
from blocklocal.lab.data.table import load_table
from blocklocal.lab.settings import Settings
from blocklocal.lab.tasks.task import Task


class Table(Task):
    """Rows of F numbers with one label each, for models that take (B, F)."""

    unit = "rows"

    @property
    def features(self) -> int:
        """The number F of features."""
        return self.dataset.train.inputs.shape[1]

    @property
    def shape(self) -> str:
        return f"{self.features} numbers, {self.grading.targets}"

    @property
    def facts(self) -> dict[str, Any]:
        classes = {"classes": list(self.dataset.classes)} if self.dataset.classes else {}
        return super().facts | {"features": self.features} | classes

    def build(self) -> nn.Module:
        (outputs,) = self.sizes.values()
        return models.build(
            self.settings.model,
            channels=self.features,
            size=(1, 1),
            classes=outputs,
            arguments=models.read_arguments(self.settings.model_args),
        )


def read(settings: Settings) -> Dataset:
    """The table of a run. UserError: see `load_table`."""
    name = settings.data.partition(":")[2]
    return load_table(
        name,
        target=settings.target,
        target_type=settings.target_type,
        train_size=settings.train_size,
        test_size=settings.test_size,
    ).hold_out(settings.validation)
