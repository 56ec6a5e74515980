"""A task without its data: shapes on the meta device, from the facts that a run or a cache records."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from blocklocal.lab.data.batches import Normalisation
from blocklocal.lab.data.dataset import Dataset, Split
from blocklocal.lab.settings import Settings
from blocklocal.lab.tasks.images import Images
from blocklocal.lab.tasks.task import Task
from blocklocal.lab.tasks.text import LanguageModelling


def task_without_data(settings: Settings, facts: Mapping[str, Any]) -> Task:
    """The task of a run with these settings, for building its model where the data are not.

    facts: see `Task.facts`. Its splits are tensors on the meta device, which have a shape and no values.
    ValueError, KeyError, TypeError: these are not the facts of such a task.
    """
    return _TASKS[settings.kind](settings, facts)


def _images(settings: Settings, facts: Mapping[str, Any]) -> Task:
    channels, height, width = facts["shape"]
    dataset = _dataset(settings, facts, unit="images", sample=(channels, height, width), dtype=torch.uint8)
    return Images(dataset, settings, normalisation=Normalisation(_meta(channels, 1, 1), _meta(channels, 1, 1)))


def _text(settings: Settings, facts: Mapping[str, Any]) -> Task:
    classes = [str(token) for token in range(facts["tokens"])]
    window = (settings.context,)
    dataset = _dataset(
        settings, {**facts, "classes": classes}, unit="windows", sample=window, dtype=torch.int64, labels=window
    )
    return LanguageModelling(dataset, settings, vocabulary=None, tokens=_meta(0, dtype=torch.int64))


def _table(settings: Settings, facts: Mapping[str, Any]) -> Task:
    from blocklocal.lab.tasks.regression import Regression, Standardisation  # pandas takes a second to import
    from blocklocal.lab.tasks.table import Table

    rows = partial(_dataset, settings, unit="rows", sample=(facts["features"],), dtype=torch.float32)
    if "target_deviation" not in facts:
        return Table(rows(facts), settings)
    scale = Standardisation(facts["target_mean"], facts["target_deviation"])
    numbers = rows({**facts, "classes": []}, labels=(1,), label_dtype=torch.float32)
    return Regression(numbers, settings, standardisation=scale)


_TASKS = {"images": _images, "text": _text, "table": _table}


def _dataset(
    settings: Settings,
    facts: Mapping[str, Any],
    *,
    unit: str,
    sample: tuple[int, ...],
    dtype: torch.dtype,
    labels: tuple[int, ...] = (),
    label_dtype: torch.dtype = torch.int64,
) -> Dataset:
    def split(samples: int) -> Split:
        return Split(_meta(samples, *sample, dtype=dtype), _meta(samples, *labels, dtype=label_dtype))

    held_out = facts.get(f"validation_{unit}")
    train, test = split(facts[f"training_{unit}"]), split(facts[f"test_{unit}"])
    return Dataset(settings.data, tuple(facts["classes"]), train, test, split(held_out) if held_out else None)


def _meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")
