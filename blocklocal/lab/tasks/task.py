"""What a training run needs to know of its data, whatever they are."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from blocklocal.lab.data import batches
from blocklocal.lab.data.dataset import Dataset, Split
from blocklocal.lab.settings import Settings
from blocklocal.lab.tasks.grading import Grading, LabelGrading
from blocklocal.lab.tasks.measure import ACCURACY, Measure
from blocklocal.messages import Criterion

Batch = tuple[Tensor, Tensor]


class Task(ABC):
    """Data of one kind, on a device, and how a model learns from them.

    dataset: its splits, and the names of the classes, if any. settings: of the run, with all options of the data.
    """

    unit: ClassVar[str] = "images"
    """What samples are called."""
    shown: ClassVar[tuple[Measure, ...]] = (ACCURACY,)
    """What a run shows of its tests; it is judged by the last. See `measures_of`."""

    def __init__(self, dataset: Dataset, settings: Settings) -> None:
        self.dataset, self.settings = dataset, settings

    def to(self, device: torch.device) -> Self:
        """The same task with its data on another device."""
        moved = copy.copy(self)
        moved.dataset = self.dataset.to(device)
        return moved

    @property
    @abstractmethod
    def shape(self) -> str:
        """What a sample is, in words."""

    @property
    def facts(self) -> dict[str, Any]:
        """What config.json of a run records about its data, as plain values."""
        data, unit = self.dataset, self.unit
        held_out = {f"validation_{unit}": len(data.validation)} if data.validation else {}
        content = {"digest": data.digest} if data.digest else {}
        return {f"training_{unit}": len(data.train), **held_out, f"test_{unit}": len(data.test), **content}

    @property
    def epoch_size(self) -> int:
        """Number of samples in an epoch."""
        return len(self.dataset.train)

    @property
    def evaluated_at_once(self) -> int:
        """Number of samples that are evaluated together."""
        return 500

    def prepared(self, inputs: Tensor) -> Tensor:
        """Inputs of a split as they enter the model."""
        return inputs

    def few(self, size: int) -> Batch:
        """A few training samples, evenly spaced, so that they have several classes even if the samples are sorted."""
        train = self.dataset.train.of(torch.arange(size) * len(self.dataset.train) // size)
        return self.prepared(train.inputs), train.labels

    def training_batches(self, epoch: int, *, begin: int = 0) -> Iterator[Batch]:
        """Batches of epoch 1, 2, ... in the order of (seed, epoch), from batch `begin` on; the last is a full one."""
        train = self.dataset.train
        for rows in self._order(epoch, begin=begin):
            yield self.prepared(train.inputs[rows]), train.labels[rows]

    def training_labels(self, epoch: int, *, begin: int = 0) -> Iterator[Tensor]:
        """The labels of the same batches, without reading an input."""
        for rows in self._order(epoch, begin=begin):
            yield self.dataset.train.labels[rows]

    def ordered_batches(self, split: Split) -> Iterator[Batch]:
        """Batches of all samples of a split in their own order; the last batch may be smaller."""
        size = self.evaluated_at_once
        for first in range(0, len(split), size):
            yield self.prepared(split.inputs[first : first + size]), split.labels[first : first + size]

    @property
    def judged_by(self) -> Measure:
        return self.shown[-1]

    @property
    def grading(self) -> Grading:
        """How predictions are graded."""
        return LabelGrading(len(self.dataset.classes))

    @property
    def sizes(self) -> dict[str, int]:
        """What is predicted, as `BlockLocal` takes it: classes=n or outputs=n."""
        return {"classes": len(self.dataset.classes)}

    @property
    def criterion(self) -> Criterion:
        """The loss of the last block: cross-entropy with --label-smoothing."""
        return partial(cross_entropy, label_smoothing=self.settings.label_smoothing)

    @abstractmethod
    def build(self) -> nn.Module:
        """A new model of --model for this data. UserError: there is none of that name, or it fails."""

    def cuts(self) -> Sequence[str] | None:
        """Where --model is cut into --blocks by default, if it has places of its own."""
        return None

    def _order(self, epoch: int, *, begin: int) -> Iterator[Tensor]:
        rows = batches.epoch_order(len(self.dataset.train), seed=self.settings.seed, epoch=epoch)
        rows = rows.to(self.dataset.train.labels.device)
        size = self.settings.batch_size
        for first in range(begin * size, len(rows) - size + 1, size):
            yield rows[first : first + size]


def cross_entropy(prediction: Tensor, y: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
    """Mean cross-entropy in nats of logits (B, n) for labels (B,), or (B, T, n) for those of tokens (B, T)."""
    return F.cross_entropy(prediction.flatten(0, -2), y.flatten(), label_smoothing=label_smoothing)
