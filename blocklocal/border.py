"""One border: the messages that meet there and the local loss of the block before it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from blocklocal.feedback import ClosedFormFeedback, Feedback, LinearFeedback
from blocklocal.losses import LocalLoss, PredictiveTerm, VariationalTerm
from blocklocal.messages import Message, Site, Statistic


class Border(nn.Module):
    """The local loss at one border, with its feedback network and its prediction head.

    In training mode a closed-form feedback is fitted to the batch before its message is used: the E-step of the batch.
    """

    def __init__(self, site: Site, *, loss: LocalLoss, feedback: Feedback, statistic: Statistic) -> None:
        super().__init__()
        self.site, self.statistic = site, statistic
        self.weights = [weight for weight, _ in loss.terms]
        self.terms = nn.ModuleList(term.build(site) for _, term in loss.terms)
        reads_feedback = any(getattr(module, "reads_feedback", False) for module in self.terms.modules())
        self.feedback = feedback.build(site.targets, channels=site.channels) if reads_feedback else None
        learns = self.feedback is not None and any(True for _ in self.feedback.parameters())
        if learns and not any(isinstance(term, VariationalTerm) for term in self.terms):
            raise ValueError(
                f"{feedback} would never learn: only bll.Variational() trains feedback that has parameters; "
                "add it to the local loss, or use bll.ClosedFormFeedback()"
            )

    def forward(self, h: Tensor, y: Tensor) -> Tensor:
        """The local loss, a scalar, of outputs h and targets y."""
        parts = self.parts(h, y)
        return torch.stack([weight * part for weight, part in zip(self.weights, parts, strict=True)]).sum()

    def parts(self, h: Tensor, y: Tensor) -> list[Tensor]:
        """The terms of the local loss, unweighted."""
        message = self.message(h)
        rows = y.shape if self.site.targets.labels else y.shape[:-1]
        if rows != message.alpha.shape[:-1]:
            raise ValueError(
                f"y has shape {tuple(y.shape)}, and alpha at this border {tuple(message.alpha.shape)}: "
                f"one target per {'token' if self.site.tokens else 'sample'} is needed"
            )
        if self.training and isinstance(self.feedback, LinearFeedback):
            self.feedback.update(y, message.alpha.detach())
        return [term(message, y) for term in self.terms]

    def message(self, h: Tensor) -> Message:
        return Message(h, site=self.site, statistic=self.statistic, feedback=self.feedback)

    def predict(self, h: Tensor) -> Tensor:
        """Logits (B, n) of the border's prediction head."""
        for term in self.terms:
            if isinstance(term, PredictiveTerm):
                return term.head(self.message(h))
        raise ValueError("this border predicts nothing: add bll.Predictive() to its local loss")

    @torch.no_grad()
    def diagnose(self, h: Tensor, y: Tensor) -> dict[str, float]:
        """What one batch shows of the border.

        Every loss term by its name, with its index where the name recurs; `agreement`: the mean cosine between alpha
        and beta over samples, both centred over the batch; `variance_ratio`: the variance of alpha between targets over
        that within them, from a least-squares fit of alpha to the targets of this batch, both centred. It goes to zero
        where the block's output collapses.
        """
        alpha = self.message(h).alpha.flatten(0, -2)
        floor = 1e-6 * alpha.square().sum(-1).mean()
        alpha = alpha - alpha.mean(0)
        targets = y if self.site.targets.labels else y - y.to(alpha).flatten(0, -2).mean(0)
        fit = ClosedFormFeedback(ridge=1e-6, forgetting=0.0).build(self.site.targets, channels=alpha.shape[-1])
        fit.to(alpha).update(targets, alpha)
        explained = fit(targets).flatten(0, -2)
        between, within = explained.square().sum(-1).mean(), (alpha - explained).square().sum(-1).mean()
        beta = explained if self.feedback is None else self.feedback(y).flatten(0, -2)
        agreement = torch.cosine_similarity(alpha, beta - beta.mean(0), dim=-1).mean()
        ratio = between / (within + floor).clamp(min=1e-30)
        found = (part.item() for part in (*self.parts(h, y), agreement, ratio))
        return dict(zip(self.diagnostics, found, strict=True))

    @property
    def diagnostics(self) -> list[str]:
        """The names of what `diagnose` reports."""
        names = [type(term).__name__.removesuffix("Term").lower() for term in self.terms]
        names = [name if names.count(name) == 1 else f"{name}{i}" for i, name in enumerate(names)]
        return [*names, "agreement", "variance_ratio"]
