"""Classification of the rows of a table."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from blocklocal.lab import models
from blocklocal.lab.data.table import load_table
from blocklocal.lab.settings import Settings
from blocklocal.lab.tasks.task import Task


class Table(Task):
    """Rows of F numbers with one label each, for models that take (B, F)."""

    unit = "rows"

    @staticmethod
    def load(settings: Settings, *, device: torch.device) -> Table:
        """UserError: see `load_table`."""
        name = settings.data.partition(":")[2]
        sizes = {"train_size": settings.train_size, "test_size": settings.test_size}
        dataset = load_table(name, target=settings.target, **sizes).hold_out(settings.validation)
        return Table(dataset.to(device), settings)

    @property
    def shape(self) -> str:
        return f"{self.dataset.train.inputs.shape[1]} numbers, {len(self.dataset.classes)} classes"

    @property
    def facts(self) -> dict[str, Any]:
        data = self.dataset
        return super().facts | {"features": data.train.inputs.shape[1], "classes": list(data.classes)}

    def build(self) -> nn.Module:
        return models.build(
            self.settings.model,
            channels=self.dataset.train.inputs.shape[1],
            size=(1, 1),
            classes=len(self.dataset.classes),
            arguments=models.read_arguments(self.settings.model_args),
        )
