"""The variational bound (Eq. 3) in linear-Gaussian chains, where every message, posterior and likelihood is known.

x -> z_1 -> ... -> z_N -> y with z_k ~ N(w_k z_{k-1}, s_k), z_0 = x and z_{N+1} = y, in some independent channels.
"""

import math
from dataclasses import dataclass

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch import distributions as D
from torch.testing import assert_close

import blocklocal as bll

CHANNELS = 3
FAMILY = bll.GaussianMeanVariance()


@dataclass(frozen=True)
class Chain:
    """Transition weights and variances (N + 1, C), input and target (C,)."""

    w: Tensor
    s: Tensor
    x: Tensor
    y: Tensor

    @property
    def latents(self) -> range:
        return range(len(self.w) - 1)

    def forward(self) -> list[D.Normal]:
        """alpha_k = p(z_k | x) for k = 1..N, and p(y | x), by Eq. 1."""
        messages, mean, variance = [], self.x, torch.zeros_like(self.x)
        for w, s in zip(self.w, self.s, strict=True):
            mean, variance = w * mean, w**2 * variance + s
            messages.append(D.Normal(mean, variance.sqrt()))
        return messages

    def likelihood(self, k: int) -> tuple[Tensor, Tensor]:
        """p(y | z_k) = N(c z_k, u): (c, u)."""
        c, u = torch.ones_like(self.x), torch.zeros_like(self.x)
        for w, s in zip(self.w[k + 1 :].flip(0), self.s[k + 1 :].flip(0), strict=True):
            c, u = c * w, u + c**2 * s
        return c, u

    def loss(self) -> Tensor:
        """L = -log p(y | x)."""
        return -self.forward()[-1].log_prob(self.y).sum()

    def posteriors(self) -> list[D.Normal]:
        """p(z_k | x, y), by conditioning the joint Gaussian of all z and y."""
        n, found = len(self.w), []
        for c in range(CHANNELS):
            lower = torch.eye(n, dtype=torch.float64)  # (z, y) = lower^-1 (w_1 x + noise, noise, ...)
            lower[torch.arange(1, n), torch.arange(n - 1)] = -self.w[1:, c]
            source = torch.zeros(n, dtype=torch.float64)
            source[0] = self.w[0, c] * self.x[c]
            inverse = torch.linalg.inv(lower)
            mean, covariance = inverse @ source, inverse @ torch.diag(self.s[:, c]) @ inverse.T
            gain = covariance[:, -1] / covariance[-1, -1]
            conditioned = covariance - torch.outer(gain, covariance[-1])
            found.append((mean + gain * (self.y[c] - mean[-1]), conditioned.diagonal()))
        means, variances = (torch.stack(values, 1) for values in zip(*found, strict=True))
        return [D.Normal(means[k], variances[k].sqrt()) for k in self.latents]


@st.composite
def chains(draw: st.DrawFn) -> Chain:
    n = draw(st.integers(1, 4)) + 1
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    w = torch.empty(n, CHANNELS, dtype=torch.float64).uniform_(0.3, 1.5, generator=generator)
    w *= torch.randint(2, w.shape, generator=generator) * 2 - 1
    s = torch.empty_like(w).uniform_(0.2, 2.0, generator=generator)
    x, y = torch.randn(2, CHANNELS, dtype=torch.float64, generator=generator)
    return Chain(w, s, x, y)


def natural(message: D.Normal) -> Tensor:
    return FAMILY.natural(torch.cat([message.mean, message.variance.log()]))


def feedback(seed: int) -> D.Normal:
    generator = torch.Generator().manual_seed(seed)
    mean, log_scale = torch.randn(2, CHANNELS, dtype=torch.float64, generator=generator)
    return D.Normal(mean, log_scale.exp())


def exact_feedback(chain: Chain, k: int) -> D.Normal:
    """p(y | z_k) seen as a distribution over z_k."""
    c, u = chain.likelihood(k)
    return D.Normal(chain.y / c, u.sqrt() / c.abs())


def gap(chain: Chain, betas: list[D.Normal]) -> list[Tensor]:
    """KL(q_k || p_k) with q_k = rho_k, the product of alpha_k and beta_k (Eq. 2)."""
    found = []
    for alpha, beta, posterior in zip(chain.forward(), betas, chain.posteriors(), strict=False):
        eta_rho = FAMILY.product(natural(alpha), natural(beta))
        found.append(FAMILY.kl_divergence(eta_rho, natural(posterior)).sum())
    return found


@given(chains(), st.integers(0, 2**31))
def test_bound_is_above_the_loss_for_any_feedback(chain: Chain, seed: int) -> None:
    """F = L + mean_k KL(q_k || p_k) >= L, and equals the mean of KL(q_k || alpha_k) - E_q[log p(y | z_k)] (Eq. 5)."""
    betas = [feedback(seed + k) for k in chain.latents]
    bound = chain.loss() + torch.stack(gap(chain, betas)).mean()
    assert (bound > chain.loss()).item()
    local = []
    for k, (alpha, beta) in enumerate(zip(chain.forward(), betas, strict=False)):
        eta_rho = FAMILY.product(natural(alpha), natural(beta))
        first, second = FAMILY.mean(eta_rho).unbind(-1)
        c, u = chain.likelihood(k)
        error = chain.y**2 - 2 * chain.y * c * first + c**2 * second  # E_q (y - c z)^2
        log_likelihood = -(error / u + torch.log(2 * math.pi * u)) / 2
        local.append((FAMILY.kl_divergence(eta_rho, natural(alpha)) - log_likelihood).sum())
    assert_close(bound, torch.stack(local).mean())


@given(chains())
def test_bound_is_tight_for_the_exact_feedback(chain: Chain) -> None:
    betas = [exact_feedback(chain, k) for k in chain.latents]
    for divergence in gap(chain, betas):
        assert_close(divergence, torch.zeros_like(divergence), atol=1e-8, rtol=0)


@given(chains())
def test_messages_give_the_posterior_of_the_joint_distribution(chain: Chain) -> None:
    for k, posterior in enumerate(chain.posteriors()):
        eta = FAMILY.product(natural(chain.forward()[k]), natural(exact_feedback(chain, k)))
        assert_close(eta, natural(posterior), rtol=1e-6, atol=1e-8)


@given(chains())
def test_the_evidence_at_every_border_is_the_likelihood(chain: Chain) -> None:
    """Belief propagation: log of the integral of alpha_k(z) p(y | z) is log p(y | x) at every k."""
    for k in chain.latents:
        c, _ = chain.likelihood(k)
        evidence = FAMILY.evidence(natural(chain.forward()[k]), natural(exact_feedback(chain, k)))
        log_likelihood = evidence - math.log(2 * math.pi) / 2 - c.abs().log()  # as a density of y, not of z_k
        assert_close(-log_likelihood.sum(), chain.loss())


@given(chains(), st.floats(0.1, 3.0))
def test_known_variance_feedback_of_the_right_mean_is_exact_where_its_variance_is(chain: Chain, s2: float) -> None:
    """With the variances of alpha and of the exact feedback both s2, bll.Gaussian gives the posterior itself."""
    family, last = bll.Gaussian(s2), len(chain.w) - 2
    w, s = chain.w.clone(), chain.s.clone()
    w[: last + 1], s[: last + 1] = 1.0, s2 / (last + 1)
    w[last + 1], s[last + 1] = 1.0, s2
    known = Chain(w, s, chain.x, chain.y)
    rho = family.product(family.natural(known.forward()[last].mean), family.natural(known.y))
    assert_close(rho, natural(known.posteriors()[last]), rtol=1e-6, atol=1e-8)
