"""Test accuracy of every exit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from blocklocal import BlockLocal
from blocklocal.graph import mode
from blocklocal.lab.data.batches import Normalisation, ordered_batches
from blocklocal.lab.data.dataset import Split
from blocklocal.lab.errors import UserError

SIZE = 500  # images at once


@dataclass(frozen=True)
class Exits:
    """The predictions of K exits for N images.

    correct: (K, N), whether the exit's class is the label. confidence: (K, N), its probability. combined: (N,),
    whether the most probable class of all exits, with their weights, is the label.
    """

    correct: Tensor
    confidence: Tensor
    combined: Tensor

    def __post_init__(self) -> None:
        """Check the scores. UserError: an exit gives nan, which would count as one of the classes."""
        wrong = self.confidence.isnan().nonzero()
        if len(wrong):
            exit, image = wrong[0].tolist()
            raise UserError(f"exit {exit} gives nan for test image {image}: its weights or statistics have diverged")

    @property
    def accuracies(self) -> list[float]:
        """The accuracy of each exit, as a fraction."""
        return self.correct.double().mean(1).tolist()

    @property
    def combined_accuracy(self) -> float:
        return self.combined.double().mean().item()

    def leaving(self, threshold: float) -> Tensor:
        """(N,): the first exit whose confidence reaches the threshold, or the last if none does."""
        sure = self.confidence >= threshold
        sure[-1] = True
        return sure.int().argmax(0)

    def early_accuracy(self, threshold: float) -> float:
        """The accuracy if images leave as in `leaving`."""
        return self.correct.gather(0, self.leaving(threshold)[None]).double().mean().item()


def grade(scores: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Whether the most probable class is the label, and its probability, from log-probabilities (K, B, n) of exits."""
    best, classes = scores.max(-1)
    return classes == y, best.exp()


def evaluate(learner: BlockLocal, split: Split, *, normalisation: Normalisation, size: int = SIZE) -> Exits:
    """Evaluate all exits on a split, in evaluation mode."""
    correct, confidence, combined = [], [], []
    for scores, y in _scores(learner, split, normalisation=normalisation, size=size):
        for kept, found in zip((correct, confidence), grade(scores, y), strict=True):
            kept.append(found)
        combined.append(learner.pool(scores).argmax(-1) == y)
    return Exits(torch.cat(correct, 1).cpu(), torch.cat(confidence, 1).cpu(), torch.cat(combined).cpu())


def validate(learner: BlockLocal, split: Split, *, normalisation: Normalisation) -> Exits:
    """Evaluate all exits on a held-out split, after fitting their weights to it."""
    scores, labels = zip(*_scores(learner, split, normalisation=normalisation, size=SIZE), strict=True)
    return weigh(learner, torch.cat(scores, 1), torch.cat(labels))


def weigh(learner: BlockLocal, scores: Tensor, y: Tensor) -> Exits:
    """Fit the weights of the exits to log-probabilities (K, N, n) of N held-out images, and evaluate the exits on them.

    UserError: scores that are not finite.
    """
    try:
        learner.pool.fit(scores, y, criterion=learner.criterion)
    except ValueError as error:
        raise UserError(f"validation images: {error}") from error
    correct, confidence = grade(scores, y)
    return Exits(correct.cpu(), confidence.cpu(), (learner.pool(scores).argmax(-1) == y).cpu())


@torch.no_grad()
def _scores(
    learner: BlockLocal, split: Split, *, normalisation: Normalisation, size: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Log-probabilities (K, B, n) of all exits, and labels, in evaluation mode."""
    with mode(learner, training=False):
        for x, y in ordered_batches(split, normalisation=normalisation, size=size):
            yield torch.stack([logits.float().log_softmax(-1) for logits in learner.exits(x)]), y
