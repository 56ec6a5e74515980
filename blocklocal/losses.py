"""The local loss of a border, as settings that can be added and scaled: 0.1 * Variational() + Predictive(head="conv").

A term's settings are frozen and independent of a model; `build(spec)` makes the module of one border, which maps
(border_input, y) to a scalar: the mean loss over samples (and tokens) in nats.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from blocklocal.arguments import describe, loss_of, require, require_number
from blocklocal.families import Family, Gaussian
from blocklocal.feedback import Targets, at_least_single
from blocklocal.heads import HEADS, Head, LinearHead, affordable_head, default_head
from blocklocal.messages import BorderInput, BorderSpec, spatial_std


class LocalLoss:
    """A local loss: terms with weights."""

    @property
    def terms(self) -> tuple[tuple[float, Term], ...]:
        raise NotImplementedError

    def __add__(self, other: LocalLoss) -> WeightedSum:
        require(other, LocalLoss, name="the term added to a local loss", needed="pass a term, such as bll.Predictive()")
        return WeightedSum(self.terms + other.terms)

    def __radd__(self, other: object) -> WeightedSum:
        raise TypeError(f"{describe(other)} + a local loss: pass a term, such as bll.Predictive()")

    def __mul__(self, weight: float) -> WeightedSum:
        require_number(weight, name="weight")
        return WeightedSum(tuple((weight * w, term) for w, term in self.terms))

    __rmul__ = __mul__


@dataclass(frozen=True)
class WeightedSum(LocalLoss):
    """A sum of weighted terms."""

    weighted: tuple[tuple[float, Term], ...]

    def __post_init__(self) -> None:
        for weight, _ in self.weighted:
            require_number(weight, name="weight")

    @property
    def terms(self) -> tuple[tuple[float, Term], ...]:
        return self.weighted


class Term(LocalLoss):
    """One term of a local loss: settings that build the module of one border.

    >>> class Decay(Term):
    ...     def build(self, spec):
    ...         return DecayTerm()
    >>> class DecayTerm(nn.Module):
    ...     def forward(self, border_input, y):
    ...         return border_input.alpha.square().mean()
    >>> loss = Predictive() + 0.01 * Decay()
    """

    @property
    def terms(self) -> tuple[tuple[float, Term], ...]:
        return ((1.0, self),)

    def build(self, spec: BorderSpec) -> nn.Module:
        """The term's module at one border: forward(border_input, y) -> scalar."""
        raise NotImplementedError(
            f"{type(self).__name__} has no build(spec): define it, to return the nn.Module of this term at a border"
        )


@dataclass(frozen=True)
class Variational(Term):
    """KL(rho || alpha) + H(alpha), summed over latents (Eqs. 5-6), where rho is the product of alpha and beta (Eq. 2).

    For the Gaussian of known variance s2 this is |beta - alpha|^2 / (8 s2) plus constants. beta is a constant for the
    block; feedback with parameters gets their gradient from the same divergence with alpha held fixed. With
    `fixed_posterior` rho is held fixed too, as in an E-step: the gradient in natural parameters is then the mean of
    alpha minus that of rho, for the Gaussian twice as large. If rho is not fixed, it follows alpha more closely the
    more certain alpha is, so that for Bernoulli, Categorical and Poisson the gradient can lead away from beta.

    estimate_variance: for the Gaussian, estimate s2 of every channel from the batch, as the mean of (alpha - beta)^2,
    instead of taking the family's: the M-step in closed form. A channel then counts by the share of it that is left
    unexplained, not by its scale.

    Families other than the Gaussian of known variance also have an entropy to lower. It is lowest when every latent is
    certain, whatever the class, and unbounded for GaussianMeanVariance: give them a small weight, such as 0.01.

    >>> loss = 0.1 * Variational(estimate_variance=True) + Predictive()
    >>> [weight for weight, term in loss.terms]
    [0.1, 1.0]
    """

    family: Family = field(default_factory=Gaussian)
    fixed_posterior: bool = False
    estimate_variance: bool = False

    def __post_init__(self) -> None:
        require(self.family, Family, name="family", needed="pass a family, such as bll.Gaussian()")
        require(self.fixed_posterior, bool, name="fixed_posterior", needed="pass True or False")
        require(self.estimate_variance, bool, name="estimate_variance", needed="pass True or False")
        if self.estimate_variance and not isinstance(self.family, Gaussian):
            raise ValueError(f"estimate_variance=True needs family=bll.Gaussian(), but the family is {self.family}")

    def build(self, spec: BorderSpec) -> nn.Module:
        self.family.natural(torch.zeros(1, spec.statistics))  # refuses channels that do not fit
        return VariationalTerm(self, targets=spec.targets)


class VariationalTerm(nn.Module):
    reads_feedback = trains_feedback = True

    def __init__(self, settings: Variational, *, targets: Targets) -> None:
        super().__init__()
        self.settings, self.targets = settings, targets

    def forward(self, border_input: BorderInput, y: Tensor) -> Tensor:
        assert border_input.feedback is not None
        family, alpha = self.settings.family, border_input.alpha
        beta, log_scale = border_input.feedback(y).to(alpha.dtype), None
        if self.settings.estimate_variance:
            squares, kept = (alpha - beta).detach().square(), self.targets.kept(y)
            squares = squares.flatten(0, -2) if kept is None else squares[kept]
            scale = squares.mean(0).clamp_min(1e-6).sqrt()
            family, alpha, beta, log_scale = Gaussian(), alpha / scale, beta / scale, scale.log()
        loss = family.variational_loss(alpha, beta, fixed_posterior=self.settings.fixed_posterior)
        if log_scale is not None:
            loss = loss + log_scale
        if beta.requires_grad:
            eta_alpha, eta_beta = family.natural(alpha.detach()), family.natural(beta)
            fit = family.kl_divergence(family.product(eta_alpha, eta_beta), eta_alpha)
            loss = loss + fit - fit.detach()
        return self.targets.mean(loss.sum(-1), y)


@dataclass(frozen=True)
class Predictive(Term):
    """The model's criterion on a prediction made at the border (paper, section 3).

    head: one of "linear", "normalised", "mlp", "conv", "residual", "pooled", "patches", "depthwise", "evidence", or a
    function BorderSpec -> nn.Module, where the module maps a BorderInput to logits. By default "pooled" for feature
    maps and "normalised" for vectors and tokens. budget: choose the head by its cost: the first of "pooled" and "conv"
    that takes at most this share of the operations of its own block (0.1: a tenth), or else "normalised". It is chosen
    once the cuts are known; those are found with the default. A torch that cannot count operations gets the default.

    >>> 0.1 * Variational() + Predictive(budget=0.5) == BLL
    True
    """

    head: str | Head | None = None
    budget: float | None = None

    def __post_init__(self) -> None:
        if self.budget is not None:
            require_number(self.budget, name="budget", above=0)
            if self.head is not None:
                raise ValueError("head= and budget= both choose the head: pass one of them")
        if self.head is None or (callable(self.head) and not isinstance(self.head, nn.Module)):
            return
        allowed = f"choose {', '.join(HEADS)}, or pass a function"
        require(self.head, str, name="head", needed=allowed)
        if self.head not in HEADS:
            raise ValueError(f"head={self.head!r} is unknown: {allowed}")

    def build(self, spec: BorderSpec) -> PredictiveTerm:
        if self.budget is not None and spec.operations is not None:
            head = affordable_head(spec, budget=self.budget)
        elif self.head is None:
            head = default_head(spec)
        else:
            head = self.head if callable(self.head) else HEADS[self.head]
        try:
            module = head(spec)
        except TypeError as error:
            raise TypeError(
                f"head cannot be called with a BorderSpec ({error}): pass a function BorderSpec -> nn.Module"
            ) from error
        require(module, nn.Module, name="the return value of head", needed="pass a function BorderSpec -> nn.Module")
        return PredictiveTerm(module, spec=spec)


class PredictiveTerm(nn.Module):
    """A prediction head and its criterion, which all borders share: the state dict of a learner has it once."""

    def __init__(self, head: nn.Module, *, spec: BorderSpec) -> None:
        super().__init__()
        self.head, self.criterion = head, spec.criterion
        if isinstance(self.criterion, nn.Module):
            self.register_state_dict_post_hook(_without_criterion)
            self.register_load_state_dict_pre_hook(_with_criterion)

    def forward(self, border_input: BorderInput, y: Tensor) -> Tensor:
        return loss_of(self.criterion, self.predict(border_input), y)

    def predict(self, border_input: BorderInput) -> Tensor:
        return border_input.predict(self.head)


def _without_criterion(term: PredictiveTerm, state: dict[str, Any], prefix: str, *_: object) -> None:
    for name in [name for name in state if name.startswith(f"{prefix}criterion.")]:
        del state[name]


def _with_criterion(term: PredictiveTerm, state: dict[str, Any], prefix: str, *_: object) -> None:
    assert isinstance(term.criterion, nn.Module)
    for name, value in term.criterion.state_dict(prefix=f"{prefix}criterion.").items():
        state.setdefault(name, value)


@dataclass(frozen=True)
class Posterior(Predictive):
    """Cross-entropy of a border's prediction with the posterior of the targets and the belief of the earlier exits.

    For categorical messages, whose natural parameters are logits, the posterior is the product of powers

        p*(y) ~ p_y^a p_(k-1)^(1-a)    (Eq. 2),

    with a = `power` and the targets p_y: the labels, of which a share, `softness` (1 - depth), is spread evenly over
    all classes, most at the first border. The belief p_(k-1) of the exits before border k is handed on with
    `add_beliefs=True`, and is a constant; at the first border, or without it, p* is p_y. With `softness` 0 the labels
    alone decide, whatever the belief.

    >>> loss = Posterior(power=0.9, softness=0.2)
    """

    power: float = 1.0
    softness: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require_number(self.power, name="power", least=0, most=1)
        require_number(self.softness, name="softness", least=0, most=1)
        if self.power < 1 and self.softness == 0:
            raise ValueError(f"power={self.power} has no effect with softness=0, where labels alone decide: raise it")

    def build(self, spec: BorderSpec) -> PosteriorTerm:
        if not spec.targets.labels:
            raise ValueError("Posterior() compares distributions over classes: it needs labels (classes=)")
        return PosteriorTerm(super().build(spec).head, spec=spec, settings=self)


class PosteriorTerm(PredictiveTerm):
    def __init__(self, head: nn.Module, *, spec: BorderSpec, settings: Posterior) -> None:
        super().__init__(head, spec=spec)
        self.targets, self.power = spec.targets, settings.power
        self.softness = settings.softness * (1 - spec.depth)

    def forward(self, border_input: BorderInput, y: Tensor) -> Tensor:
        prediction = border_input.predict(self.head)
        prediction = prediction.to(at_least_single(prediction.dtype))
        target = self._target(border_input.belief, y, dtype=prediction.dtype)
        loss = F.cross_entropy(prediction.flatten(0, -2), target.flatten(0, -2), reduction="none")
        return self.targets.mean(loss.view(y.shape), y)

    def _target(self, belief: Tensor | None, y: Tensor, *, dtype: torch.dtype) -> Tensor:
        labels = F.one_hot(self.targets.classes(y), self.targets.size).to(dtype)
        target = (1 - self.softness) * labels + self.softness / self.targets.size
        if belief is None or self.softness == 0:
            return target
        return (self.power * target.log() + (1 - self.power) * belief.log_softmax(-1)).softmax(-1)


@dataclass(frozen=True)
class Similarity(Term):
    """Similarity matching, the "sim" of Pred-Sim (Nokland and Eidnes, 2019).

    Mean squared difference between two similarity matrices of the batch: that of a 3x3 convolution (for vectors: a
    linear layer) of h, and that of the one-hot labels. A similarity matrix is the Gram matrix of one feature vector
    per sample, centred and of unit length; the features of a map are its channels' standard deviations over space.
    Pred-Sim is 0.99 * Similarity() + 0.01 * Predictive(head="linear").

    >>> 0.99 * Similarity() + 0.01 * Predictive(LinearHead) == PRED_SIM
    True
    """

    def build(self, spec: BorderSpec) -> nn.Module:
        return SimilarityTerm(spec)


class SimilarityTerm(nn.Module):
    def __init__(self, spec: BorderSpec) -> None:
        super().__init__()
        if spec.tokens:
            raise ValueError("Similarity() compares samples: it does not apply to targets per token")
        if spec.targets.ignore_index is not None:
            raise ValueError("Similarity() compares all samples of a batch: it has no ignore_index=")
        if spec.targets.size < 2 or spec.channels < 2:
            raise ValueError(
                f"Similarity() compares patterns, but there are {spec.targets.size} targets and {spec.channels} "
                "channels: at least two of each are needed"
            )
        self.targets = spec.targets
        c = spec.channels
        self.transform = nn.Conv2d(c, c, 3, padding=1, bias=False) if spec.is_map else nn.Linear(c, c, bias=False)

    def forward(self, border_input: BorderInput, y: Tensor) -> Tensor:
        if border_input.spec.is_map:
            features = spatial_std(self.transform(border_input.map).flatten(2).to(border_input.alpha.dtype))
        else:
            features = self.transform(border_input.statistics).to(border_input.alpha.dtype)
        target = F.one_hot(y, self.targets.size) if self.targets.labels else y
        return F.mse_loss(similarity(features), similarity(target.to(features.dtype)))


def similarity(features: Tensor) -> Tensor:
    """Gram matrix (B, B) of features (B, F), with each sample centred and scaled to unit length."""
    centred = features - features.mean(1, keepdim=True)
    unit = F.normalize(centred, dim=1)
    return unit @ unit.T


PRED_SIM = 0.99 * Similarity() + 0.01 * Predictive(LinearHead)
"""Pred-Sim (Nokland and Eidnes, 2019)."""

BLL = 0.1 * Variational() + Predictive(budget=0.5)
"""Block-local learning with the default local loss."""

BLL_PAPER = Variational() + Predictive(LinearHead)
"""Block-local learning with the paper's local loss."""
