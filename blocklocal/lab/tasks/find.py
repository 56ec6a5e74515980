"""The task of a run, by its data."""

from __future__ import annotations

from collections.abc import Callable

import torch

from blocklocal.lab.settings import Settings
from blocklocal.lab.tasks.images import Images
from blocklocal.lab.tasks.task import Task


def load_task(settings: Settings, *, device: torch.device) -> Task:
    """Load the data of a run onto a device. UserError: data that cannot be used."""
    return _loader(settings.kind)(settings).to(device)


def _loader(kind: str) -> Callable[[Settings], Task]:
    if kind == "text":
        from blocklocal.lab.tasks.text import LanguageModelling

        return LanguageModelling.load
    if kind == "table":
        return _load_table
    return Images.load


def _load_table(settings: Settings) -> Task:
    from blocklocal.lab.tasks.regression import Regression  # pandas takes a second to import
    from blocklocal.lab.tasks.table import Table, read

    dataset = read(settings)
    return Table(dataset, settings) if dataset.classes else Regression.of(dataset, settings)
