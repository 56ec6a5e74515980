"""Test accuracy and loss of every exit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from blocklocal import BlockLocal
from blocklocal.graph import mode
from blocklocal.lab.data.dataset import Split
from blocklocal.lab.errors import UserError
from blocklocal.lab.tasks.task import Task


@dataclass(frozen=True)
class Exits:
    """The predictions of K exits for N samples, or tokens of samples.

    correct: (K, N), whether the exit's class is the label. confidence: (K, N), its probability. nats: (K, N), minus the
    logarithm of the label's probability. combined, combined_nats: (N,), correct and nats of all exits with their
    weights.
    """

    correct: Tensor
    confidence: Tensor
    nats: Tensor
    combined: Tensor
    combined_nats: Tensor

    def __post_init__(self) -> None:
        """Check the scores. UserError: an exit gives nan, which would count as one of the classes."""
        wrong = self.confidence.isnan().nonzero()
        if len(wrong):
            exit, sample = wrong[0].tolist()
            raise UserError(f"exit {exit} gives nan for test sample {sample}: its weights or statistics have diverged")

    @property
    def accuracies(self) -> list[float]:
        """The accuracy of each exit, as a fraction."""
        return self.correct.double().mean(1).tolist()

    @property
    def combined_accuracy(self) -> float:
        return self.combined.double().mean().item()

    @property
    def losses(self) -> list[float]:
        """The mean cross-entropy of each exit, in nats."""
        return self.nats.double().mean(1).tolist()

    @property
    def combined_loss(self) -> float:
        return self.combined_nats.double().mean().item()

    @property
    def record(self) -> dict[str, Any]:
        """What a line of metrics.jsonl says of a test."""
        return {
            "test_accuracy": self.accuracies,
            "test_accuracy_all": self.combined_accuracy,
            "test_loss": self.losses,
            "test_loss_all": self.combined_loss,
        }

    def leaving(self, threshold: float) -> Tensor:
        """(N,): the first exit whose confidence reaches the threshold, or the last if none does."""
        sure = self.confidence >= threshold
        sure[-1] = True
        return sure.int().argmax(0)

    def early_accuracy(self, threshold: float) -> float:
        """The accuracy if samples leave as in `leaving`."""
        return self.correct.gather(0, self.leaving(threshold)[None]).double().mean().item()


def grade(scores: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Whether the most probable class is the label, its probability, and nats, each (..., N).

    scores: log-probabilities (..., B, n) for labels (B,), or (..., B, T, n) for those of tokens (B, T).
    """
    best, classes = scores.max(-1)
    label = y.expand(classes.shape).unsqueeze(-1)
    found = classes == y, best.exp(), -scores.gather(-1, label).squeeze(-1)
    correct, confidence, nats = (part.flatten(part.dim() - y.dim()) for part in found)
    return correct, confidence, nats


def evaluate(learner: BlockLocal, split: Split, *, task: Task) -> Exits:
    """Evaluate all exits on a split, in evaluation mode."""
    return _joined([_graded(learner, scores, y) for scores, y in _scores(learner, split, task=task)])


def validate(learner: BlockLocal, split: Split, *, task: Task) -> Exits:
    """Evaluate all exits on a held-out split, after fitting their weights to it."""
    scores, labels = zip(*_scores(learner, split, task=task), strict=True)
    return weigh(learner, torch.cat(scores, 1), torch.cat(labels))


def weigh(learner: BlockLocal, scores: Tensor, y: Tensor) -> Exits:
    """Fit the weights of the exits to log-probabilities (K, N, n) of held-out samples, and evaluate the exits on them.

    UserError: scores that are not finite.
    """
    try:
        learner.pool.fit(scores, y, criterion=learner.criterion)
    except ValueError as error:
        raise UserError(f"validation samples: {error}") from error
    return _joined([_graded(learner, scores, y)])


def _graded(learner: BlockLocal, scores: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    """The fields of `Exits` for a batch."""
    combined, _, nats = grade(learner.pool(scores).log_softmax(-1), y)
    return tuple(part.cpu() for part in (*grade(scores, y), combined, nats))


def _joined(batches: Sequence[tuple[Tensor, ...]]) -> Exits:
    return Exits(*(torch.cat(parts, -1) for parts in zip(*batches, strict=True)))


@torch.no_grad()
def _scores(learner: BlockLocal, split: Split, *, task: Task) -> Iterator[tuple[Tensor, Tensor]]:
    """Log-probabilities (K, B, n) of all exits, and labels, in evaluation mode."""
    with mode(learner, training=False):
        for x, y in task.ordered_batches(split):
            yield torch.stack([logits.float().log_softmax(-1) for logits in learner.exits(x)]), y
