"""The families against torch.distributions, automatic differentiation and numerical integration, in float64."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch import distributions as D
from torch.testing import assert_close

import blocklocal as bll
from blocklocal.families import Family

CHANNELS = 6
VARIANCE = 0.7


@dataclass(frozen=True)
class Case:
    """A family, the same distribution by torch.distributions, and its sufficient statistics T(z)."""

    family: Family
    reference: Callable[[Tensor], D.Distribution]
    statistics: Callable[[Tensor], Tensor]
    support: Tensor

    def __str__(self) -> str:
        return type(self.family).__name__


def halves(parameters: Tensor) -> D.Normal:
    mu, log_variance = parameters.chunk(2, -1)
    return D.Normal(mu, torch.exp(0.5 * log_variance))


def powers(z: Tensor) -> Tensor:
    return torch.stack([z, z**2], -1)


def column(z: Tensor) -> Tensor:
    return z.unsqueeze(-1)


def indicators(z: Tensor) -> Tensor:
    return torch.nn.functional.one_hot(z.long(), 3).double()


GRID = torch.linspace(-60, 60, 40_001, dtype=torch.float64)
COUNTS = torch.arange(2_000, dtype=torch.float64)
CASES = [
    Case(bll.Gaussian(VARIANCE), lambda p: D.Normal(p, math.sqrt(VARIANCE)), powers, GRID),
    Case(bll.GaussianMeanVariance(), halves, powers, GRID),
    Case(bll.Bernoulli(), lambda p: D.Bernoulli(logits=p), column, COUNTS[:2]),
    Case(bll.Categorical(3), lambda p: D.Categorical(logits=p.unflatten(-1, (-1, 3))), indicators, COUNTS[:3]),
    Case(bll.Poisson(), lambda p: D.Poisson(p.exp()), column, COUNTS),
]
each_case = pytest.mark.parametrize("case", CASES, ids=str)
messages = st.lists(st.floats(-4, 4), min_size=CHANNELS, max_size=CHANNELS).map(
    lambda values: torch.tensor(values, dtype=torch.float64)
)


def masses(case: Case, parameters: Tensor) -> Tensor:
    """log p(z) over the support (S, D), from torch.distributions, times the grid's spacing."""
    log_p = case.reference(parameters).log_prob(case.support.unsqueeze(-1))
    return log_p + (math.log(GRID[1] - GRID[0]) if case.support is GRID else 0.0)


def posterior(case: Case, alpha: Tensor, beta: Tensor) -> Tensor:
    """log rho(z) over the support (S, D): alpha times the likelihood that beta is, normalised by summation."""
    likelihood = case.statistics(case.support).unsqueeze(-2) * case.family.natural(beta)
    return torch.log_softmax(masses(case, alpha) + likelihood.sum(-1), 0)


@each_case
@given(messages, messages)
def test_divergence_is_that_of_torch_distributions(case: Case, p: Tensor, q: Tensor) -> None:
    ours = case.family.kl_divergence(case.family.natural(p), case.family.natural(q))
    theirs = D.kl_divergence(case.reference(p), case.reference(q))
    assert_close(ours, theirs, atol=1e-6, rtol=1e-9)


@each_case
@given(messages)
def test_entropy_is_that_of_torch_distributions(case: Case, p: Tensor) -> None:
    if isinstance(case.family, bll.Poisson):  # torch has none
        log_p = masses(case, p)
        theirs = -(log_p.exp() * log_p).sum(0)
    else:
        theirs = case.reference(p).entropy()
    assert_close(case.family.entropy(case.family.natural(p)), theirs, atol=1e-6, rtol=0)


@pytest.mark.parametrize("rate", [1e-3, 1.0, 20.0, 31.9, 32.1, 60.0, 400.0])
def test_poisson_entropy_from_small_to_large_rates(rate: float) -> None:
    counts = torch.arange(5_000, dtype=torch.float64)
    log_rate = torch.tensor([math.log(rate)], dtype=torch.float64, requires_grad=True)
    log_p = D.Poisson(log_rate.exp()).log_prob(counts)
    summed = -(log_p.exp() * log_p).sum()
    entropy = bll.Poisson().entropy(bll.Poisson().natural(log_rate)).sum()
    assert_close(entropy, summed, atol=1e-6, rtol=0)
    assert_close(*(torch.autograd.grad(value, log_rate)[0] for value in (entropy, summed)), atol=1e-5, rtol=0)


@each_case
@given(messages)
def test_mean_is_the_gradient_of_the_log_normalizer(case: Case, p: Tensor) -> None:
    eta = case.family.natural(p).requires_grad_()
    (gradient,) = torch.autograd.grad(case.family.log_normalizer(eta).sum(), eta)
    assert_close(case.family.mean(eta), gradient)


@each_case
@given(messages)
def test_mean_is_the_expected_sufficient_statistic(case: Case, p: Tensor) -> None:
    expected = (masses(case, p).exp().unsqueeze(-1) * case.statistics(case.support).unsqueeze(-2)).sum(0)
    assert_close(case.family.mean(case.family.natural(p)), expected, atol=1e-6, rtol=1e-6)


@each_case
@given(messages, messages)
def test_product_is_the_normalised_product_of_densities(case: Case, alpha: Tensor, beta: Tensor) -> None:
    family, log_rho = case.family, posterior(case, alpha, beta)
    eta_alpha = family.natural(alpha)
    eta_rho = family.product(eta_alpha, family.natural(beta))
    if isinstance(family, bll.Poisson):  # rates up to e^8 leave the support
        eta_rho, log_rho = eta_rho[alpha + beta < 6], log_rho[:, alpha + beta < 6]
        eta_alpha, alpha = eta_alpha[alpha + beta < 6], alpha[alpha + beta < 6]
    moments = (log_rho.exp().unsqueeze(-1) * case.statistics(case.support).unsqueeze(-2)).sum(0)
    assert_close(family.mean(eta_rho), moments, atol=1e-6, rtol=1e-6)
    divergence = (log_rho.exp() * (log_rho - masses(case, alpha))).sum(0)
    assert_close(family.kl_divergence(eta_rho, eta_alpha), divergence, atol=1e-6, rtol=1e-6)


@each_case
@given(messages, messages)
def test_divergence_is_never_negative_and_zero_to_itself(case: Case, p: Tensor, q: Tensor) -> None:
    eta_p, eta_q = case.family.natural(p), case.family.natural(q)
    assert (case.family.kl_divergence(eta_p, eta_q) > -1e-9).all()
    assert_close(case.family.kl_divergence(eta_p, eta_p), torch.zeros_like(eta_p[..., 0]), atol=1e-9, rtol=0)


@given(messages, messages, st.floats(0.2, 5.0))
def test_gaussian_posterior_has_the_mean_of_means_and_half_the_variance(a: Tensor, b: Tensor, s2: float) -> None:
    family = bll.Gaussian(s2)
    rho = family.mean(family.product(family.natural(a), family.natural(b)))
    assert_close(rho[..., 0], (a + b) / 2)
    assert_close(rho[..., 1] - rho[..., 0] ** 2, torch.full_like(a, s2 / 2))
    theirs = D.kl_divergence(D.Normal((a + b) / 2, math.sqrt(s2 / 2)), D.Normal(a, math.sqrt(s2)))
    closed = (b - a) ** 2 / (8 * s2) + math.log(2) / 2 - 1 / 4
    assert_close(theirs, closed)
    eta_a, eta_b = family.natural(a), family.natural(b)
    assert_close(family.kl_divergence(family.product(eta_a, eta_b), eta_a), closed)


@pytest.mark.parametrize("fixed_posterior", [False, True])
@given(messages, messages, st.floats(0.2, 5.0))
def test_gaussian_loss_in_few_operations_is_that_of_any_family(
    fixed_posterior: bool, a: Tensor, b: Tensor, s2: float
) -> None:
    family, a = bll.Gaussian(s2), a.requires_grad_()
    short = family.variational_loss(a, b, fixed_posterior=fixed_posterior)
    general = Family.variational_loss(family, a, b, fixed_posterior=fixed_posterior)
    assert_close(short, general)
    assert_close(*(torch.autograd.grad(loss.sum(), a)[0] for loss in (short, general)))


@given(messages, messages, st.floats(0.2, 5.0))
def test_gaussian_evidence_is_the_integral_of_the_product(a: Tensor, b: Tensor, s2: float) -> None:
    family = bll.Gaussian(s2)
    evidence = family.evidence(family.natural(a), family.natural(b))
    assert_close(evidence, -((a - b) ** 2) / (4 * s2) - 0.5 * math.log(2 * s2))
    z = GRID.unsqueeze(-1)
    log_product = D.Normal(a, math.sqrt(s2)).log_prob(z) + D.Normal(b, math.sqrt(s2)).log_prob(z)
    integral = torch.logsumexp(log_product, 0) + math.log(GRID[1] - GRID[0])
    assert_close(evidence, integral + 0.5 * math.log(2 * math.pi), atol=1e-6, rtol=0)


@given(messages, messages)
def test_categorical_evidence_is_the_sum_of_the_product(a: Tensor, b: Tensor) -> None:
    family = bll.Categorical(3)
    p, q = (torch.softmax(parameters.unflatten(-1, (-1, 3)), -1) for parameters in (a, b))
    evidence = family.evidence(family.natural(a), family.natural(b))
    assert_close(evidence, (p * q).sum(-1).log())


@given(st.floats(-100, 100))
def test_gradient_survives_single_precision_far_from_zero(offset: float) -> None:
    family, noise = bll.Gaussian(), torch.linspace(-1, 1, 9)
    a, b = (offset + noise).requires_grad_(), offset - noise
    eta = family.natural(a)
    divergence = family.kl_divergence(family.product(eta, family.natural(b)), eta)
    (gradient,) = torch.autograd.grad(divergence.sum(), a)
    assert_close(gradient, (a - b).detach() / 4, atol=1e-4, rtol=1e-4)


def test_leading_dimensions_are_kept() -> None:
    for case in CASES:
        eta = case.family.natural(torch.zeros(2, 5, CHANNELS))
        assert eta.shape[:2] == case.family.mean(eta).shape[:2] == case.family.entropy(eta).shape[:2] == (2, 5)


def test_settings_are_refused() -> None:
    with pytest.raises(ValueError, match=r"variance=0.0: .* variance > 0"):
        bll.Gaussian(0.0)
    with pytest.raises(ValueError, match="variance > 0"):
        bll.Gaussian(float("nan"))
    with pytest.raises(ValueError, match="categories >= 2"):
        bll.Categorical(1)
    with pytest.raises(ValueError, match="divisible by 4, but the border has 6"):
        bll.Categorical(4).natural(torch.zeros(3, 6))
    with pytest.raises(ValueError, match="divisible by 2, but the border has 5"):
        bll.GaussianMeanVariance().natural(torch.zeros(3, 5))
