"""A border: the messages that meet there and the local loss of the block before it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from blocklocal.arguments import describe, passes, require_module, require_scalar
from blocklocal.feedback import ClosedFormFeedback, Feedback
from blocklocal.graph import mode
from blocklocal.losses import LocalLoss
from blocklocal.messages import BorderInput, BorderSpec, Statistic
from blocklocal.recompute import NORMS
from blocklocal.refreshed_head import refreshed


class Border(nn.Module):
    """The local loss at one border, with its feedback network and its prediction head.

    In training mode, closed-form feedback is fitted to the batch before its message is used: the E-step on the batch.
    Where no gradients are recorded, as in torch.no_grad(), nothing learns and the feedback does not change.

    A term is a module with forward(border_input, y) -> scalar. It may have predict(border_input) -> prediction, and
    the attribute `trains_feedback` if the parameters of the feedback learn from it. A feedback is a module y -> beta
    and may have fit(y, alpha), which is called with each training batch.
    """

    def __init__(self, spec: BorderSpec, *, loss: LocalLoss, feedback: Feedback, statistic: Statistic) -> None:
        super().__init__()
        self.spec = replace(spec, following=None, output_layer=None)  # only heads read other parts of the model
        self.statistic = statistic
        if getattr(statistic, "reads_map", False) and spec.reduces and not spec.is_map:
            raise ValueError(
                f"statistic={statistic} reads feature maps (B, C, H, W), but a sample at this border has shape "
                f"{spec.shape} ({spec.layout}): pass another statistic, such as bll.SpatialMoments()"
            )
        self.weights = [weight for weight, _ in loss.terms]
        built = [term.build(spec) for _, term in loss.terms]
        for module, (_, term) in zip(built, loss.terms, strict=True):
            require_module(module, name=f"the return value of {type(term).__name__}.build()")
        self.terms = nn.ModuleList(built)
        reads_feedback = any(getattr(module, "reads_feedback", False) for module in self.terms.modules())
        self.feedback = feedback.build(spec.targets, channels=spec.statistics) if reads_feedback else None
        if reads_feedback:
            require_module(self.feedback, name="the return value of feedback.build()")
        learns = self.feedback is not None and any(True for _ in self.feedback.parameters())
        if learns and not any(getattr(term, "trains_feedback", False) for term in self.terms):
            raise ValueError(
                f"{feedback} would never learn: only bll.Variational() trains feedback with parameters; "
                "add it to the local loss, or use bll.ClosedFormFeedback()"
            )

    def begin_step(self, model: nn.Module) -> None:
        """Begin a training step, if gradients are recorded: heads that copy weights of the model refresh their copy.

        A learner calls it before the forward pass of the block.
        """
        if self.training and torch.is_grad_enabled():
            for head in refreshed(self.terms):
                head.begin_step(model)

    def forward(self, border_input: BorderInput, y: Tensor) -> Tensor:
        """The local loss, a scalar, for targets y."""
        parts = self.parts(border_input, y)
        return torch.stack([weight * part for weight, part in zip(self.weights, parts, strict=True)]).sum()

    def parts(self, border_input: BorderInput, y: Tensor) -> list[Tensor]:
        """The unweighted terms of the local loss."""
        self.spec.targets.match(y, border_input.alpha, what="alpha at this border")
        fit = getattr(self.feedback, "fit", None)
        if fit is not None and self.training and torch.is_grad_enabled():
            fit(y, border_input.alpha.detach())
        try:
            parts = [term(border_input, y) for term in self.terms]
        except ValueError as error:
            self._explain(error, samples=len(y))
            raise
        for term, part in zip(self.terms, parts, strict=True):
            require_scalar(part, name=type(term).__name__)
        return parts

    @torch.no_grad()
    def check(self, h: Tensor) -> None:
        """ValueError: for an example of h, the statistic, the feedback or a head does not return what it should."""
        border_input, n = self.message(h), self.spec.targets.size
        places = h.movedim(1, -1) if self.spec.channels_first else h
        rows = places.shape[:-1] if self.spec.tokens else h.shape[:1]
        with passes(h, name="h", through="statistic="):
            _require_reals(border_input.statistics, (*rows, self.spec.statistics), h.device, name="statistic")
        with mode(self, training=False):
            if self.feedback is not None:
                labels = self.spec.targets.labels
                y = torch.zeros(
                    rows if labels else (*rows, n), dtype=torch.int64 if labels else h.dtype, device=h.device
                )
                with passes(y, name="y", through="feedback="):
                    _require_reals(self.feedback(y), (*rows, self.spec.statistics), h.device, name="feedback")
            for term in self.terms:
                predict = getattr(term, "predict", None)
                if predict is not None:
                    with passes(h, name="h", through="head="):
                        _require_reals(predict(border_input), (*rows, n), h.device, name="head")

    def message(self, h: Tensor, belief: Tensor | None = None) -> BorderInput:
        """The input of this border: the block's output h and, if there is one, the belief of the earlier exits."""
        return BorderInput(h, spec=self.spec, statistic=self.statistic, feedback=self.feedback, belief=belief)

    def _explain(self, error: ValueError, *, samples: int) -> None:
        """ValueError: a head that normalises over the batch was given one sample."""
        normalises = any(isinstance(module, NORMS) for module in self.terms.modules())
        if samples == 1 and self.training and normalises:
            raise ValueError(
                "the head at a border normalises over the batch, which has one sample: pass at least two (drop_last="
                'True of a DataLoader), or use another head, such as bll.Predictive(head="linear")'
            ) from error

    @property
    def predictive(self) -> Any:
        """The first term that predicts at this border. ValueError: there is none."""
        for term in self.terms:
            if hasattr(term, "predict"):
                return term
        raise ValueError("this border predicts nothing: add bll.Predictive() to its local loss")

    def predict(self, border_input: BorderInput) -> Tensor:
        """The prediction of `predictive`: (B, n), or (B, T, n) per token."""
        return self.predictive.predict(border_input)

    @torch.no_grad()
    def diagnose(self, border_input: BorderInput, y: Tensor) -> dict[str, float]:
        """Report what one batch shows of the border.

        Every loss term under its name, with an index if the name recurs. `agreement`: the cosine between alpha and
        beta, both centred over the batch, averaged over samples. `variance_ratio`: the variance of alpha between
        targets divided by that within them, from a least-squares fit of alpha to the targets of this batch, both
        centred; it goes to zero when the block's output collapses. Both are computed over the finite samples only.
        """
        parts, alpha = self.parts(border_input, y), border_input.alpha.flatten(0, -2)
        targets = y.flatten() if self.spec.targets.labels else y.flatten(0, -2)
        finite = alpha.isfinite().all(1) & targets.view(len(alpha), -1).isfinite().all(1)
        if (kept := self.spec.targets.kept(targets)) is not None:
            finite &= kept
        alpha, targets = alpha[finite], targets[finite]
        beta = None if self.feedback is None else self.feedback(targets)
        floor = 1e-6 * alpha.square().sum(-1).mean()
        alpha = alpha - alpha.mean(0)
        if not self.spec.targets.labels:
            targets = targets - targets.to(alpha).mean(0)
        explain = ClosedFormFeedback(ridge=1e-6, forgetting=0.0).build(self.spec.targets, channels=alpha.shape[-1])
        explain.to(alpha).fit(targets, alpha)
        explained = explain(targets)
        between, within = explained.square().sum(-1).mean(), (alpha - explained).square().sum(-1).mean()
        beta = explained if beta is None else beta
        agreement = torch.cosine_similarity(alpha, beta - beta.mean(0), dim=-1).mean()
        ratio = between / (within + floor).clamp(min=1e-30)
        found = (part.item() for part in (*parts, agreement, ratio))
        return dict(zip(self.diagnostics, found, strict=True))

    @property
    def diagnostics(self) -> list[str]:
        """The names of the values that `diagnose` reports."""
        names = [type(term).__name__.removesuffix("Term").lower() for term in self.terms]
        names = [name if names.count(name) == 1 else f"{name}{i}" for i, name in enumerate(names)]
        return [*names, "agreement", "variance_ratio"]


def _require_reals(found: object, shape: tuple[int, ...], device: torch.device, *, name: str) -> None:
    if not isinstance(found, Tensor) or found.shape != shape or not found.is_floating_point():
        raise ValueError(f"{name} returns {describe(found)}: it must return a real tensor of shape {shape}")
    if found.device != device or found.layout is not torch.strided:
        raise ValueError(f"{name} returns {describe(found)}: it must return a dense tensor on {device}")
