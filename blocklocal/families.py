"""Exponential families: the distributions that forward and feedback messages are made of.

A message about the latent variable z of one border is a member of a family

    p(z) = h(z) exp(<eta, T(z)> - A(eta)),

independent over latents. A family defines how the channel statistics of a border become natural parameters eta, its
log-normalizer A, and the mean m = grad A of the sufficient statistics T. Everything the method needs follows from
these: the product of two messages adds their natural parameters (Eq. 2), the divergence of two members is the Bregman
divergence of A, and the entropy is A(eta) - <eta, m(eta)> - E[log h].

Shapes: parameters (..., C) for C channels; eta and m (..., D, P) for D latents of P natural parameters each; A (...,
D). A feedback message enters as the likelihood exp(<eta, T(z)>) of z, so that the product stays in the family.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from blocklocal.arguments import require_number, require_tensor, require_whole
from blocklocal.precision import full_precision

CHUNK = 2**20  # numbers, 4 MiB in single precision


class Family(ABC):
    """An exponential family whose members are independent over latents.

    A subclass defines `natural`, `log_normalizer` and `mean`, and `expected_log_base` if its base measure h is not 1.

    >>> class Exponential(Family):
    ...     def natural(self, parameters):
    ...         return -(-parameters.unsqueeze(-1)).exp()
    ...     def log_normalizer(self, eta):
    ...         return -(-eta[..., 0]).log()
    ...     def mean(self, eta):
    ...         return -1 / eta
    >>> Exponential().entropy(torch.tensor([[-1.0]]))
    tensor([1.])
    """

    @abstractmethod
    def natural(self, parameters: Tensor) -> Tensor:
        """Natural parameters (..., D, P) from channel statistics (..., C)."""

    @abstractmethod
    def log_normalizer(self, eta: Tensor) -> Tensor:
        """A(eta), shape (..., D)."""

    @abstractmethod
    def mean(self, eta: Tensor) -> Tensor:
        """The expected sufficient statistics grad A(eta), shape (..., D, P)."""

    def expected_log_base(self, eta: Tensor) -> Tensor:
        """E[log h(z)], shape (..., D); by default zero, for h = 1."""
        return torch.zeros_like(eta[..., 0])

    def product(self, eta_alpha: Tensor, eta_beta: Tensor) -> Tensor:
        """Natural parameters of the normalised product of two messages (Eq. 2)."""
        return eta_alpha + eta_beta

    def kl_divergence(self, eta_p: Tensor, eta_q: Tensor) -> Tensor:
        """KL(p || q) in nats, shape (..., D): the Bregman divergence of the log-normalizer."""
        _require_alike(eta_p, eta_q, names=("eta_p", "eta_q"))
        inner = ((eta_q - eta_p) * self.mean(eta_p)).sum(-1)
        return self.log_normalizer(eta_q) - self.log_normalizer(eta_p) - inner

    def entropy(self, eta: Tensor) -> Tensor:
        """Entropy in nats, shape (..., D)."""
        inner = (eta * self.mean(eta)).sum(-1)
        return self.log_normalizer(eta) - inner - self.expected_log_base(eta)

    def variational_loss(self, alpha: Tensor, beta: Tensor, *, fixed_posterior: bool) -> Tensor:
        """KL(rho || alpha) + H(alpha) (Eqs. 5-6), shape (..., D), from the messages' channel statistics (..., C).

        rho is the product of alpha and beta (Eq. 2); beta is a constant, and so is rho with `fixed_posterior`.
        """
        _require_alike(alpha, beta, names=("alpha", "beta"))
        eta_alpha = self.natural(alpha)
        eta_rho = self.product(eta_alpha, self.natural(beta.detach()))
        if fixed_posterior:
            eta_rho = eta_rho.detach()
        return self.kl_divergence(eta_rho, eta_alpha) + self.entropy(eta_alpha)

    def evidence(self, eta_alpha: Tensor, eta_beta: Tensor) -> Tensor:
        """Log of the integral of the product of two normalised messages, up to a constant, shape (..., D)."""
        joint = self.log_normalizer(self.product(eta_alpha, eta_beta))
        return joint - self.log_normalizer(eta_alpha) - self.log_normalizer(eta_beta)

    def evidence_matrix(self, alpha: Tensor, beta: Tensor) -> Tensor:
        """`evidence` summed over latents, (..., n), of statistics alpha (..., C) with each of n statistics beta (n, C).

        It is computed for a few of the n at a time, and again in the backward pass, so that intermediate results stay
        near CHUNK numbers. Gaussian and Poisson override it with one matrix product.
        """
        eta_alpha, eta_beta = self.natural(alpha).unsqueeze(-3), self.natural(beta)

        def columns(eta_alpha: Tensor, eta_beta: Tensor) -> Tensor:
            return self.evidence(eta_alpha, eta_beta).sum(-1)

        parts = eta_beta.split(max(1, CHUNK // max(1, eta_alpha.numel())))
        found = [checkpoint(columns, eta_alpha, part, use_reentrant=False, preserve_rng_state=False) for part in parts]
        return torch.cat(found, -1)


class GaussianNatural(Family):
    """What all Gaussians share: eta = (mu / v, -1 / 2v), T(z) = (z, z^2), h = 1 / sqrt(2 pi)."""

    def log_normalizer(self, eta: Tensor) -> Tensor:
        linear, quadratic = eta.unbind(-1)
        return -(linear**2) / (4 * quadratic) - 0.5 * torch.log(-2 * quadratic)

    def mean(self, eta: Tensor) -> Tensor:
        linear, quadratic = eta.unbind(-1)
        mu, variance = -linear / (2 * quadratic), -0.5 / quadratic
        return torch.stack([mu, mu**2 + variance], -1)

    def expected_log_base(self, eta: Tensor) -> Tensor:
        return torch.full_like(eta[..., 0], -0.5 * math.log(2 * math.pi))


@dataclass(frozen=True)
class Gaussian(GaussianNatural):
    """Gaussian of known variance: each channel statistic is the mean of one latent (the paper's case, section 2.2).

    >>> Gaussian(variance=0.5).natural(torch.zeros(8, 16)).shape
    torch.Size([8, 16, 2])
    """

    variance: float = 1.0

    def __post_init__(self) -> None:
        require_number(self.variance, name="variance", above=0)

    def natural(self, parameters: Tensor) -> Tensor:
        quadratic = torch.full_like(parameters, -0.5 / self.variance)
        return torch.stack([parameters / self.variance, quadratic], -1)

    def evidence_matrix(self, alpha: Tensor, beta: Tensor) -> Tensor:
        """-|alpha - beta|^2 / 4 s2 and a constant; centring both on the mean of beta reduces cancellation."""
        with full_precision(alpha):
            centre = beta.mean(0)
            alpha, beta = alpha - centre, beta - centre
            squares = alpha.square().sum(-1, keepdim=True) + beta.square().sum(-1)
            distances = torch.addmm(squares.flatten(0, -2), alpha.flatten(0, -2), beta.T, alpha=-2.0)
        constant = 0.5 * alpha.shape[-1] * math.log(2 * self.variance)
        return -distances.view(squares.shape) / (4 * self.variance) - constant

    def variational_loss(self, alpha: Tensor, beta: Tensor, *, fixed_posterior: bool) -> Tensor:
        """(beta - alpha)^2 / 8 s2 and constants: the same value in a tenth of the operations."""
        _require_alike(alpha, beta, names=("alpha", "beta"))
        divergence = (beta.detach() - alpha).square() * (0.125 / self.variance)
        if fixed_posterior:
            divergence = 2 * divergence - divergence.detach()
        constant = 0.5 * math.log(2) - 0.25 + 0.5 * math.log(2 * math.pi * math.e * self.variance)
        return divergence + constant


@dataclass(frozen=True)
class GaussianMeanVariance(GaussianNatural):
    """Gaussian of unknown variance: the first half of the channels are means, the second half log-variances.

    >>> GaussianMeanVariance().natural(torch.zeros(8, 16)).shape
    torch.Size([8, 8, 2])
    """

    def natural(self, parameters: Tensor) -> Tensor:
        mu, log_variance = parameters.unflatten(-1, (2, _latents(parameters, 2, self))).unbind(-2)
        precision = torch.exp(-log_variance)
        return torch.stack([mu * precision, -0.5 * precision], -1)


@dataclass(frozen=True)
class Bernoulli(Family):
    """Bernoulli: each channel statistic is the logit of one binary latent.

    >>> Bernoulli().mean(Bernoulli().natural(torch.zeros(1, 2)))
    tensor([[[0.5000],
             [0.5000]]])
    """

    def natural(self, parameters: Tensor) -> Tensor:
        return parameters.unsqueeze(-1)

    def log_normalizer(self, eta: Tensor) -> Tensor:
        return F.softplus(eta.squeeze(-1))

    def mean(self, eta: Tensor) -> Tensor:
        return torch.sigmoid(eta)


@dataclass(frozen=True)
class Categorical(Family):
    """Categorical: consecutive groups of `categories` channels are the logits of one latent each.

    >>> Categorical(categories=4).natural(torch.zeros(8, 16)).shape
    torch.Size([8, 4, 4])
    """

    categories: int

    def __post_init__(self) -> None:
        require_whole(self.categories, name="categories", least=2)

    def natural(self, parameters: Tensor) -> Tensor:
        return parameters.unflatten(-1, (_latents(parameters, self.categories, self), self.categories))

    def log_normalizer(self, eta: Tensor) -> Tensor:
        return torch.logsumexp(eta, -1)

    def mean(self, eta: Tensor) -> Tensor:
        return torch.softmax(eta, -1)


@dataclass(frozen=True)
class Poisson(Family):
    """Poisson: each channel statistic is the logarithm of the rate of one count.

    >>> Poisson().mean(Poisson().natural(torch.zeros(1, 1)))
    tensor([[[1.]]])
    """

    def natural(self, parameters: Tensor) -> Tensor:
        return parameters.unsqueeze(-1)

    def log_normalizer(self, eta: Tensor) -> Tensor:
        return torch.exp(eta.squeeze(-1))

    def mean(self, eta: Tensor) -> Tensor:
        return torch.exp(eta)

    def evidence_matrix(self, alpha: Tensor, beta: Tensor) -> Tensor:
        """The sum of e^(alpha + beta) - e^alpha - e^beta; the exponents are balanced, so that no factor overflows."""
        with full_precision(alpha):
            centre = beta.mean(0)
            joint = torch.exp(alpha + centre) @ torch.exp(beta - centre).T
            return joint - alpha.exp().sum(-1, keepdim=True) - beta.exp().sum(-1)

    def expected_log_base(self, eta: Tensor) -> Tensor:
        """-E[log z!]: below a rate of 32 a sum over the counts that matter, above it from Stirling's entropy series."""
        rate = eta.squeeze(-1).exp()
        small, large = eta.clamp(max=math.log(32.0)), rate.clamp(min=32.0)
        counts = torch.arange(128, dtype=eta.dtype, device=eta.device)
        log_factorial = torch.lgamma(counts + 1)
        log_pmf = counts * small - small.exp() - log_factorial
        summed = (log_pmf.exp() * log_factorial).sum(-1)
        series = 1 / (12 * large) + 1 / (24 * large**2) + 19 / (360 * large**3) + 9 / (80 * large**4)
        entropy = 0.5 * torch.log(2 * math.pi * math.e * large) - series
        stirling = entropy - large + large * large.log()
        return -torch.where(rate < 32.0, summed, stirling)


def _require_alike(p: Tensor, q: Tensor, *, names: tuple[str, str]) -> None:
    """TypeError: not tensors. ValueError: tensors of different shapes, which would be broadcast."""
    for name, value in zip(names, (p, q), strict=True):
        require_tensor(value, name=name)
    if p.shape != q.shape:
        ours, theirs = names
        raise ValueError(
            f"{ours} has shape {tuple(p.shape)} and {theirs} {tuple(q.shape)}: their shapes must be the same"
        )


def _latents(parameters: Tensor, size: int, family: Family) -> int:
    """The number of latents of `size` parameters that the channels hold."""
    latents, rest = divmod(parameters.shape[-1], size)
    if rest:
        raise ValueError(
            f"{family} needs a number of channels divisible by {size}, but the border has {parameters.shape[-1]}: "
            "cut the model elsewhere or choose another family"
        )
    return latents
