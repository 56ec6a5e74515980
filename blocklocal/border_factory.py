"""The borders of one learner, made from the features that stand there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from blocklocal.border import Border
from blocklocal.feedback import Feedback, Targets
from blocklocal.layout import Layout, given_layouts
from blocklocal.lookahead import Lookahead
from blocklocal.losses import LocalLoss, Predictive
from blocklocal.messages import Criterion, Statistic
from blocklocal.output_layer import OutputLayer
from blocklocal.shape_probe import border_spec


@dataclass(frozen=True)
class BorderFactory:
    """The settings that all borders of a learner share. layout: as the user passed it."""

    targets: Targets
    criterion: Criterion
    loss: LocalLoss
    feedback: Feedback
    statistic: Statistic
    layout: Layout | Sequence[Layout] | None
    output_layer: OutputLayer | None

    @property
    def counts_operations(self) -> bool:
        """Whether a head is chosen by the operations of its block."""
        return any(isinstance(term, Predictive) and term.budget is not None for _, term in self.loss.terms)

    def build(self, h: Tensor, prediction: Tensor, layout: Layout | None, **place: Any) -> Border:
        """The border at features h, in a model that gives this prediction. place: further fields of its BorderSpec."""
        spec = border_spec(h, layout=layout, prediction=prediction, targets=self.targets, criterion=self.criterion)
        per_channel = getattr(self.statistic, "per_channel", 1)
        spec = replace(spec, per_channel=per_channel, output_layer=self.output_layer, **place)
        return Border(spec, loss=self.loss, feedback=self.feedback, statistic=self.statistic).to(h)

    def trial(self, h: Tensor, prediction: Tensor, found: Layout | None) -> Callable[[Tensor], Tensor]:
        """The local loss h -> scalar of a border at h, to measure what it costs; see `balance.BorderLoss`.

        ValueError: no border can stand there, for example since the statistic cannot be taken of these features.
        """
        (chosen,) = given_layouts(self.layout, borders=1)
        y = prediction[..., 0].long().zero_() if self.targets.labels else prediction
        border = self.build(h, prediction, chosen or found)
        _ = border.message(h).statistics
        return lambda h: border(border.message(h), y)

    def check_side_inputs(self, names: Sequence[str]) -> None:
        """ValueError: heads that copy a unit of the next block, which reads inputs that a head does not get."""
        if any(isinstance(term, Predictive) and isinstance(term.head, Lookahead) for _, term in self.loss.terms):
            raise ValueError(
                f"Lookahead() copies a unit of the next block, but the blocks read {', '.join(map(repr, names))} of "
                "the model's inputs beside the features, which a head does not get: pass another head="
            )

    def check_criterion(self) -> None:
        """ValueError: a criterion with parameters, which every border would train."""
        if isinstance(self.criterion, nn.Module) and any(p.requires_grad for p in self.criterion.parameters()):
            raise ValueError("criterion has parameters, which every border would train: pass one without")
