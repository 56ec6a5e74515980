"""How predictions are graded: sample by sample, and from that in a few numbers for all samples."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from blocklocal.lab.tasks.measure import ACCURACY, LOSS, RMSE, Measure

Grades = dict[str, Tensor]
"""What is known of each sample, or token of a sample, by name: each (..., N) in single precision."""


class Grading(ABC):
    """Grades predictions, of several exits at once where tensors have more dimensions in front."""

    measures: ClassVar[tuple[Measure, ...]]
    """What a test records; of held-out samples the first alone is recorded."""

    @property
    @abstractmethod
    def targets(self) -> str:
        """What is predicted, in words."""

    @abstractmethod
    def shape(self, y: Tensor) -> tuple[int, ...]:
        """The shape of a prediction for targets y."""

    @abstractmethod
    def scores(self, prediction: Tensor) -> Tensor:
        """What is graded, and combined by `ExitPool`, in single precision."""

    @abstractmethod
    def grade(self, scores: Tensor, y: Tensor) -> Grades:
        """The grades (..., N) of scores (..., *shape(y))."""

    @abstractmethod
    def faults(self, grades: Grades) -> Tensor:
        """Where grades say nothing, since the prediction is no number: (..., N)."""

    @abstractmethod
    def means(self, grades: Grades) -> dict[str, Tensor]:
        """The measures by name, over all samples: each (...,) in double precision."""


@dataclass(frozen=True)
class LabelGrading(Grading):
    """Logits (B, n) for labels (B,), or (B, T, n) for those of tokens (B, T), by accuracy and cross-entropy in nats.

    Grades: "correct", whether the most probable class is the label; "confidence", its probability; "nats", minus the
    logarithm of the label's probability.
    """

    classes: int
    measures = ACCURACY, LOSS

    @property
    def targets(self) -> str:
        return f"{self.classes} classes"

    def shape(self, y: Tensor) -> tuple[int, ...]:
        return (*y.shape, self.classes)

    def scores(self, prediction: Tensor) -> Tensor:
        """Log-probabilities."""
        return prediction.float().log_softmax(-1)

    def grade(self, scores: Tensor, y: Tensor) -> Grades:
        best, classes = scores.max(-1)
        label = y.expand(classes.shape).unsqueeze(-1)
        nats = -scores.gather(-1, label).squeeze(-1)
        found = {"correct": (classes == y).float(), "confidence": best.exp(), "nats": nats}
        return {name: part.flatten(part.dim() - y.dim()) for name, part in found.items()}

    def faults(self, grades: Grades) -> Tensor:
        return grades["confidence"].isnan()

    def means(self, grades: Grades) -> dict[str, Tensor]:
        return {
            ACCURACY.name: grades["correct"].double().mean(-1),
            LOSS.name: grades["nats"].double().mean(-1),
        }


@dataclass(frozen=True)
class NumberGrading(Grading):
    """Numbers (B, 1) for targets (B, 1) of mean 0 and deviation 1, by their root mean squared error.

    deviation: of the targets in their own unit, in which the error is given. Grades: "square", the squared error in
    units of the deviation.
    """

    deviation: float
    measures = (RMSE,)

    @property
    def targets(self) -> str:
        return "one number"

    def shape(self, y: Tensor) -> tuple[int, ...]:
        return tuple(y.shape)

    def scores(self, prediction: Tensor) -> Tensor:
        return prediction.float()

    def grade(self, scores: Tensor, y: Tensor) -> Grades:
        return {"square": (scores - y).square().flatten(-2)}

    def faults(self, grades: Grades) -> Tensor:
        return ~grades["square"].isfinite()

    def means(self, grades: Grades) -> dict[str, Tensor]:
        return {RMSE.name: self.deviation * grades["square"].double().mean(-1).sqrt()}
