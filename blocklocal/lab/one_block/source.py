"""What a block reads: the data for block 0, stored activations for a later one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from blocklocal.lab.data.dataset import Split
from blocklocal.lab.tasks.task import Batch
from blocklocal.lab.training.experiment import Experiment


class Source(Protocol):
    """Batches of inputs of a block and targets, on its device."""

    def training(self, epoch: int, *, begin: int = 0) -> Iterator[Batch]:
        """The batches of epoch 1, 2, ..., from batch `begin` on."""
        ...

    def ordered(self, name: str, *, begin: int = 0) -> Iterator[Batch]:
        """All batches of "test" or "validation", from batch `begin` on."""
        ...

    def has(self, name: str) -> bool:
        """Whether there are samples of that name."""
        ...


class Data:
    """The data of an experiment, for its first block."""

    def __init__(self, experiment: Experiment) -> None:
        self.experiment = experiment

    def training(self, epoch: int, *, begin: int = 0) -> Iterator[Batch]:
        return self.experiment.training_batches(epoch, begin=begin)

    def ordered(self, name: str, *, begin: int = 0) -> Iterator[Batch]:
        split, first = self._split(name), begin * self.experiment.task.evaluated_at_once
        assert split is not None
        return self.experiment.task.ordered_batches(Split(split.inputs[first:], split.labels[first:]))

    def has(self, name: str) -> bool:
        return self._split(name) is not None

    def _split(self, name: str) -> Split | None:
        data = self.experiment.dataset
        return {"test": data.test, "validation": data.validation}[name]
