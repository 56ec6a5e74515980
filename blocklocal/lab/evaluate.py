"""Test accuracy of every exit."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from blocklocal import BlockLocal
from blocklocal.lab.batches import Normalisation, ordered_batches
from blocklocal.lab.data import Split
from blocklocal.lab.errors import UserError

SIZE = 500  # images at once


@dataclass(frozen=True)
class Exits:
    """What K exits say of N images.

    correct: (K, N), whether the exit's class is the label. confidence: (K, N), its probability. combined: (N,),
    whether the class of highest probability over all exits is the label.
    """

    correct: Tensor
    confidence: Tensor
    combined: Tensor

    def __post_init__(self) -> None:
        """UserError: an exit gives nan, which would count as one of the classes."""
        wrong = self.confidence.isnan().nonzero()
        if len(wrong):
            exit, image = wrong[0].tolist()
            raise UserError(f"exit {exit} gives nan for test image {image}: its weights or statistics have run away")

    @property
    def accuracies(self) -> list[float]:
        """Of each exit, as a fraction."""
        return self.correct.double().mean(1).tolist()

    @property
    def combined_accuracy(self) -> float:
        return self.combined.double().mean().item()

    def leaving(self, threshold: float) -> Tensor:
        """(N,): the first exit whose confidence reaches the threshold; the last where none does."""
        sure = self.confidence >= threshold
        sure[-1] = True
        return sure.int().argmax(0)

    def early_accuracy(self, threshold: float) -> float:
        """Of images that leave as in `leaving`."""
        return self.correct.gather(0, self.leaving(threshold)[None]).double().mean().item()


def grade(scores: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """From log-probabilities (K, B, n) of exits: whether the likeliest class is the label, and its probability."""
    best, classes = scores.max(-1)
    return classes == y, best.exp()


@torch.no_grad()
def evaluate(learner: BlockLocal, split: Split, *, normalisation: Normalisation, size: int = SIZE) -> Exits:
    """All exits on a split, in evaluation mode."""
    training = learner.training
    learner.eval()
    correct, confidence, combined = [], [], []
    for x, y in ordered_batches(split, normalisation=normalisation, size=size):
        scores = torch.stack([logits.float().log_softmax(-1) for logits in learner.exits(x)])
        for kept, found in zip((correct, confidence), grade(scores, y), strict=True):
            kept.append(found)
        combined.append(scores.mean(0).argmax(-1) == y)
    learner.train(training)
    return Exits(torch.cat(correct, 1).cpu(), torch.cat(confidence, 1).cpu(), torch.cat(combined).cpu())
