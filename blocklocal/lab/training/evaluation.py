"""Tests of every exit, and of all exits combined."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from blocklocal import BlockLocal
from blocklocal.graph import mode
from blocklocal.lab.data.dataset import Split
from blocklocal.lab.errors import UserError
from blocklocal.lab.tasks.grading import Grades, Grading
from blocklocal.lab.tasks.measure import Measure
from blocklocal.lab.tasks.task import Task


@dataclass(frozen=True)
class Exits:
    """The grades of K exits for N samples, or tokens of samples.

    grades: of each exit, (K, N). combined: of all exits with their weights, (N,).
    """

    grading: Grading
    grades: Grades
    combined: Grades

    def __post_init__(self) -> None:
        """Check the grades. UserError: an exit gives nan, which would count as one of the classes."""
        wrong = self.grading.faults(self.grades).nonzero()
        if len(wrong):
            exit, sample = wrong[0].tolist()
            raise UserError(f"exit {exit} gives nan for test sample {sample}: its weights or statistics have diverged")

    @staticmethod
    def joined(grading: Grading, batches: Iterable[tuple[Grades, Grades]]) -> Exits:
        """From the grades (K, B) of batches, and those of all exits combined, (B,)."""
        grades, combined = zip(*batches, strict=True)
        return Exits(grading, _joined(grades), _joined(combined))

    def values(self, measure: Measure) -> list[float]:
        """The measure of each exit."""
        return self.grading.means(self.grades)[measure.name].tolist()

    def combined_value(self, measure: Measure) -> float:
        """The measure of all exits combined."""
        return self.grading.means(self.combined)[measure.name].item()

    @property
    def record(self) -> dict[str, Any]:
        """What a line of metrics.jsonl says of a test."""
        return self._record("test", self.grading.measures)

    @property
    def validation_record(self) -> dict[str, Any]:
        """What a line of metrics.jsonl says of held-out samples."""
        return self._record("validation", self.grading.measures[:1])

    def leaving(self, threshold: float) -> Tensor:
        """(N,): the first exit whose confidence reaches the threshold, or the last if none does.

        KeyError: exits of numbers, which have no confidence.
        """
        sure = self.grades["confidence"] >= threshold
        sure[-1] = True
        return sure.int().argmax(0)

    def early_value(self, measure: Measure, threshold: float) -> float:
        """The measure if samples leave as in `leaving`."""
        left = self.leaving(threshold)[None]
        early = {name: part.gather(0, left)[0] for name, part in self.grades.items()}
        return self.grading.means(early)[measure.name].item()

    def _record(self, part: str, measures: Iterable[Measure]) -> dict[str, Any]:
        record = {}
        for measure in measures:
            name = f"{part}_{measure.name}"
            record |= {name: self.values(measure), f"{name}_all": self.combined_value(measure)}
        return record


def evaluate(learner: BlockLocal, split: Split, *, task: Task) -> Exits:
    """Evaluate all exits on a split, in evaluation mode."""
    grading = task.grading
    batches = _scores(learner, split, task=task)
    return Exits.joined(grading, [_graded(learner, scores, y, grading=grading) for scores, y in batches])


def validate(learner: BlockLocal, split: Split, *, task: Task) -> Exits:
    """Evaluate all exits on a held-out split, after fitting their weights to it."""
    scores, targets = zip(*_scores(learner, split, task=task), strict=True)
    return weigh(learner, torch.cat(scores, 1), torch.cat(targets), grading=task.grading)


def weigh(learner: BlockLocal, scores: Tensor, y: Tensor, *, grading: Grading) -> Exits:
    """Fit the weights of the exits to scores (K, N, ...) of held-out samples, and evaluate the exits on them.

    UserError: scores that are not finite.
    """
    try:
        learner.pool.fit(scores, y, criterion=learner.criterion)
    except ValueError as error:
        raise UserError(f"validation samples: {error}") from error
    return Exits.joined(grading, [_graded(learner, scores, y, grading=grading)])


def _graded(learner: BlockLocal, scores: Tensor, y: Tensor, *, grading: Grading) -> tuple[Grades, Grades]:
    """The grades of a batch, of each exit and of all combined."""
    combined = grading.scores(learner.pool(scores))
    return on_cpu(grading.grade(scores, y)), on_cpu(grading.grade(combined, y))


def on_cpu(grades: Grades) -> Grades:
    return {name: part.cpu() for name, part in grades.items()}


def _joined(batches: Sequence[Grades]) -> Grades:
    return {name: torch.cat([part[name] for part in batches], -1) for name in batches[0]}


@torch.no_grad()
def _scores(learner: BlockLocal, split: Split, *, task: Task) -> Iterator[tuple[Tensor, Tensor]]:
    """Scores (K, B, ...) of all exits, and targets, in evaluation mode."""
    with mode(learner, training=False):
        for x, y in task.ordered_batches(split):
            yield torch.stack([task.grading.scores(prediction) for prediction in learner.exits(x)]), y
