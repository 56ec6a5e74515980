"""Local losses against their closed forms, torch.distributions and NumPy."""

import math
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
import zoo
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch import distributions as D
from torch.nn import functional as F
from torch.testing import assert_close

import blocklocal as bll
from blocklocal.families import Family
from blocklocal.heads import NormalisedHead, PooledResidualHead
from blocklocal.lab.models import build
from blocklocal.losses import Term, similarity
from blocklocal.messages import BorderInput

CLASSES, CHANNELS, BATCH = 3, 6, 5
spec = partial(zoo.spec, classes=CLASSES)


class Fixed(nn.Module):
    """Feedback that sends a given message, with or without gradient."""

    def __init__(self, beta: Tensor) -> None:
        super().__init__()
        self.beta = nn.Parameter(beta) if beta.requires_grad else beta

    def forward(self, y: Tensor) -> Tensor:
        return self.beta


def variational(loss: bll.Variational, alpha: Tensor, beta: Tensor, *, tokens: bool = False) -> Tensor:
    at = spec(*alpha.shape[1:], tokens=tokens)
    message = BorderInput(alpha, spec=at, statistic=bll.spatial_mean, feedback=Fixed(beta))
    return loss.build(at)(message, torch.zeros(alpha.shape[:-1], dtype=torch.long))


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@given(st.integers(0, 2**31), st.floats(0.2, 5.0))
def test_gaussian_loss_and_gradient_in_closed_form(seed: int, s2: float) -> None:
    alpha, beta = random(BATCH, CHANNELS, seed=seed).requires_grad_(), random(BATCH, CHANNELS, seed=seed + 1)
    moving = variational(bll.Variational(bll.Gaussian(s2)), alpha, beta)
    fixed = variational(bll.Variational(bll.Gaussian(s2), fixed_posterior=True), alpha, beta)
    divergence = ((beta - alpha) ** 2).sum(1).mean() / (8 * s2) + CHANNELS * (math.log(2) / 2 - 1 / 4)
    entropy = CHANNELS * D.Normal(0.0, math.sqrt(s2)).entropy()
    assert_close(moving, divergence + entropy)
    assert_close(fixed, divergence + entropy)
    expected = (alpha - beta).detach() / (4 * s2) / BATCH
    assert_close(torch.autograd.grad(moving, alpha)[0], expected)
    assert_close(torch.autograd.grad(fixed, alpha)[0], 2 * expected)


@pytest.mark.parametrize("fixed_posterior", [False, True])
def test_gaussian_loss_pulls_alpha_toward_beta(fixed_posterior: bool) -> None:
    alpha, beta = random(BATCH, CHANNELS).requires_grad_(), random(BATCH, CHANNELS, seed=1)
    start = (alpha - beta).norm(dim=1)
    for _ in range(50):
        loss = variational(bll.Variational(fixed_posterior=fixed_posterior), alpha, beta)
        alpha = (alpha - 0.5 * torch.autograd.grad(loss, alpha)[0]).detach().requires_grad_()
    assert ((alpha - beta).norm(dim=1) < 0.5 * start).all()


@pytest.mark.parametrize("family", [bll.Bernoulli(), bll.Categorical(3), bll.Poisson()], ids=str)
@given(st.integers(0, 2**31))
def test_fixed_posterior_is_an_em_step(family: Family, seed: int) -> None:
    """Its gradient is the mean of alpha less that of rho, and so leads alpha along beta, whatever the family."""
    alpha, beta = random(BATCH, CHANNELS, seed=seed).requires_grad_(), random(BATCH, CHANNELS, seed=seed + 1)
    loss = variational(bll.Variational(family, fixed_posterior=True), alpha, beta)
    match = loss - family.entropy(family.natural(alpha)).sum(-1).mean()
    (gradient,) = torch.autograd.grad(match, alpha)
    means = (family.mean(family.natural(parameters.detach())).flatten(1) for parameters in (alpha, alpha + beta))
    assert_close(gradient, torch.sub(*means) / BATCH, atol=1e-8, rtol=1e-6)
    assert ((gradient * beta).sum(1) < 0).all()


@pytest.mark.parametrize("fixed_posterior", [False, True])
def test_mean_variance_loss_is_that_of_torch_distributions(fixed_posterior: bool) -> None:
    """Eqs. 5-6 written out: the product of two normals, its divergence from alpha, and alpha's entropy."""
    alpha, beta = random(BATCH, CHANNELS).requires_grad_(), random(BATCH, CHANNELS, seed=1)
    (m_a, v_a), (m_b, v_b) = ((m, lv.exp()) for m, lv in (alpha.chunk(2, -1), beta.chunk(2, -1)))
    variance = 1 / (1 / v_a + 1 / v_b)
    mean = variance * (m_a / v_a + m_b / v_b)
    if fixed_posterior:
        mean, variance = mean.detach(), variance.detach()
    p = D.Normal(m_a, v_a.sqrt())
    expected = (D.kl_divergence(D.Normal(mean, variance.sqrt()), p) + p.entropy()).sum(-1).mean()
    loss = variational(bll.Variational(bll.GaussianMeanVariance(), fixed_posterior=fixed_posterior), alpha, beta)
    assert_close(loss, expected)
    assert_close(*(torch.autograd.grad(value, alpha)[0] for value in (loss, expected)))


@pytest.mark.parametrize("family", [bll.Gaussian(0.5), bll.GaussianMeanVariance(), bll.Bernoulli()], ids=str)
@pytest.mark.parametrize("fixed_posterior", [False, True])
def test_feedback_with_parameters_gets_the_gradient_of_the_divergence_alone(
    family: Family, fixed_posterior: bool
) -> None:
    alpha, beta = random(BATCH, CHANNELS).requires_grad_(), random(BATCH, CHANNELS, seed=1)
    settings, feedback = bll.Variational(family, fixed_posterior=fixed_posterior), Fixed(beta.clone().requires_grad_())
    message = BorderInput(alpha, spec=spec(CHANNELS), statistic=bll.spatial_mean, feedback=feedback)
    loss = settings.build(spec(CHANNELS))(message, torch.zeros(BATCH, dtype=torch.long))
    constant = variational(settings, alpha, beta)
    assert_close(loss, constant)  # a beta without gradient gives the block the same loss and the same gradient
    to_alpha, to_beta = torch.autograd.grad(loss, [alpha, *feedback.parameters()])
    assert_close(to_alpha, torch.autograd.grad(constant, alpha)[0])

    def divergence(beta: Tensor) -> Tensor:
        eta_alpha = family.natural(alpha.detach())
        return family.kl_divergence(family.product(eta_alpha, family.natural(beta)), eta_alpha).sum(-1).mean()

    step = 1e-5 * random(BATCH, CHANNELS, seed=2)
    assert_close((to_beta * step).sum(), (divergence(beta + step) - divergence(beta - step)) / 2, rtol=1e-5, atol=0)


def test_tokens_are_averaged_like_samples() -> None:
    alpha, beta = random(2, 4, CHANNELS), random(2, 4, CHANNELS, seed=1)
    tokens = variational(bll.Variational(), alpha, beta, tokens=True)
    samples = variational(bll.Variational(), alpha.flatten(0, 1), beta.flatten(0, 1))
    assert_close(tokens, samples)


def test_family_must_fit_the_channels() -> None:
    with pytest.raises(ValueError, match="divisible by 4, but the border has 6"):
        bll.Variational(bll.Categorical(4)).build(spec(CHANNELS))


def test_terms_add_and_scale() -> None:
    a, b = bll.Variational(), bll.Predictive("linear")
    assert (0.1 * a + b).terms == ((0.1, a), (1.0, b))
    assert (2 * (0.5 * a + b * 3) + a).terms == ((1.0, a), (6.0, b), (1.0, a))
    assert bll.BLL.terms == ((0.1, bll.Variational()), (1.0, bll.Predictive(budget=0.5)))
    assert [weight for weight, _ in bll.PRED_SIM.terms] == [0.99, 0.01]
    assert [weight for weight, _ in bll.BLL_PAPER.terms] == [1.0, 1.0]


def test_default_heads_follow_the_shape() -> None:
    assert isinstance(bll.Predictive().build(spec(CHANNELS, 8, 8)).head, PooledResidualHead)
    assert isinstance(bll.Predictive().build(spec(CHANNELS)).head, NormalisedHead)
    assert isinstance(bll.Predictive().build(spec(7, CHANNELS)).head, NormalisedHead)


def test_predictive_is_the_criterion_of_the_head() -> None:
    class Double(nn.Module):
        def forward(self, message: BorderInput) -> Tensor:
            return 2 * message.alpha[:, :CLASSES]

    alpha, y = random(BATCH, CHANNELS), torch.tensor([0, 1, 2, 1, 0])
    message = BorderInput(alpha, spec=spec(CHANNELS), statistic=bll.spatial_mean, feedback=None)
    loss = bll.Predictive(lambda at: Double()).build(spec(CHANNELS))(message, y)
    assert_close(loss, -torch.log_softmax(2 * alpha[:, :CLASSES], 1)[torch.arange(BATCH), y].mean())
    with pytest.raises(ValueError, match="head='fancy' is unknown: choose linear, normalised, mlp, conv, residual"):
        bll.Predictive("fancy").build(spec(CHANNELS))


@pytest.mark.parametrize("power", [1.0, 0.7])
@pytest.mark.parametrize("depth", [0.0, 0.5])
def test_posterior_is_the_product_of_powers(power: float, depth: float) -> None:
    at = replace(spec(CHANNELS), depth=depth)
    term = bll.Posterior("linear", power=power, softness=0.3).build(at).double()
    h, belief = random(BATCH, CHANNELS).requires_grad_(), random(BATCH, CLASSES).requires_grad_()
    y = torch.tensor([0, 1, 2, 1, 0])
    message = BorderInput(h, spec=at, statistic=bll.spatial_mean, feedback=None, belief=belief.detach())
    loss = term(message, y)
    own, before = message.predict(term.head).detach().softmax(-1), belief.softmax(-1).detach()
    expected = 0.0
    for i in range(BATCH):
        softness = 0.3 * (1 - depth)
        targets = [(1 - softness) * float(c == y[i]) + softness / CLASSES for c in range(CLASSES)]
        products = [targets[c] ** power * before[i, c].item() ** (1 - power) for c in range(CLASSES)]
        posterior = [product / sum(products) for product in products]
        expected -= sum(posterior[c] * math.log(own[i, c].item()) for c in range(CLASSES)) / BATCH
    assert loss.item() == pytest.approx(expected, rel=1e-6)


def test_a_posterior_without_softness_or_belief_is_the_label() -> None:
    torch.manual_seed(0)
    term = bll.Posterior("linear").build(spec(CHANNELS)).double()
    h, y = random(BATCH, CHANNELS), torch.tensor([0, 1, 2, 1, 0])
    message = BorderInput(h, spec=spec(CHANNELS), statistic=bll.spatial_mean, feedback=None)
    assert_close(term(message, y), F.cross_entropy(term.head(message), y))
    with pytest.raises(ValueError, match=r"power=0\.5 has no effect with softness=0"):
        bll.Posterior(power=0.5)
    with pytest.raises(ValueError, match="needs labels"):
        bll.Posterior().build(zoo.spec(CHANNELS, classes=3, labels=False))


def test_estimated_variance_is_the_m_step() -> None:
    """The loss of the Gaussian whose variance of each channel is the mean square between alpha and beta; no other
    variance explains the batch better."""
    y, alpha = torch.tensor([0, 1, 2, 1, 0]), random(BATCH, CHANNELS)
    alpha.requires_grad_()
    feedback = bll.ClosedFormFeedback().build(spec(CHANNELS).targets, channels=CHANNELS).double()
    feedback.fit(y, alpha.detach())
    message = BorderInput(alpha, spec=spec(CHANNELS), statistic=bll.spatial_mean, feedback=feedback)
    loss = bll.Variational(estimate_variance=True).build(spec(CHANNELS))(message, y)
    beta = feedback(y)
    variance = (alpha - beta).detach().square().mean(0)
    expected = torch.stack(
        [
            bll.Gaussian(v.item()).variational_loss(alpha[:, c], beta[:, c], fixed_posterior=False).mean()
            for c, v in enumerate(variance)
        ]
    ).sum()
    assert_close(loss, expected)
    assert_close(torch.autograd.grad(loss, alpha)[0], torch.autograd.grad(expected, alpha)[0])
    likelihood = lambda v: -0.5 * ((alpha - beta).square() / v + v.log()).mean(0)  # noqa: E731
    assert (likelihood(variance) >= likelihood(1.1 * variance)).all()
    assert (likelihood(variance) >= likelihood(0.9 * variance)).all()
    with pytest.raises(ValueError, match=r"estimate_variance=True needs family=bll.Gaussian\(\)"):
        bll.Variational(bll.Bernoulli(), estimate_variance=True)


def test_similarity_is_the_correlation_between_samples() -> None:
    features = random(BATCH, 7)
    np.testing.assert_allclose(similarity(features).numpy(), np.corrcoef(features.numpy()), atol=1e-12)


def similarity_loss(term: Term, h: Tensor, y: Tensor) -> tuple[nn.Module, Tensor]:
    at = spec(*h.shape[1:], labels=not y.is_floating_point())
    module = term.build(at).to(h.dtype)
    return module, module(BorderInput(h, spec=at, statistic=bll.spatial_mean, feedback=None), y)


@pytest.mark.parametrize("labels", [True, False], ids=["labels", "dense"])
def test_similarity_of_maps_and_vectors(labels: bool) -> None:
    y = torch.tensor([0, 1, 2, 1, 0])
    targets = F.one_hot(y, CLASSES).numpy()
    for h in (random(BATCH, CHANNELS, 4, 5), random(BATCH, CHANNELS)):
        module, loss = similarity_loss(bll.Similarity(), h, y if labels else torch.tensor(targets).double())
        features = module.get_submodule("transform")(h).detach().numpy()
        if features.ndim == 4:
            features = features.std(axis=(2, 3), ddof=1)
        expected = ((np.corrcoef(features) - np.corrcoef(targets)) ** 2).mean()
        assert loss.dtype == torch.float64
        np.testing.assert_allclose(loss.item(), expected, atol=1e-12)


def test_similarity_of_single_positions_and_dead_maps_is_finite() -> None:
    for h in (torch.randn(BATCH, CHANNELS, 1, 1), torch.zeros(BATCH, CHANNELS, 4, 4)):
        h.requires_grad_()
        _, loss = similarity_loss(bll.Similarity(), h, torch.tensor([0, 1, 2, 1, 0]))
        (gradient,) = torch.autograd.grad(loss, h)
        assert torch.isfinite(loss)
        assert torch.isfinite(gradient).all()


def test_similarity_compares_samples_only() -> None:
    with pytest.raises(ValueError, match="does not apply to targets per token"):
        bll.Similarity().build(spec(4, CHANNELS, tokens=True))


@pytest.mark.parametrize(
    ("statistic", "by_numpy"),
    [(bll.spatial_mean, np.mean), (bll.spatial_max, np.max), (bll.spatial_std, np.std)],
    ids=["mean", "max", "std"],
)
def test_statistics_of_maps_and_sequences(statistic, by_numpy) -> None:
    h = random(BATCH, CHANNELS, 3, 4)
    alpha = BorderInput(h, spec=spec(CHANNELS, 3, 4), statistic=statistic, feedback=None).alpha
    np.testing.assert_allclose(alpha.numpy(), by_numpy(h.numpy(), axis=(2, 3)))
    h = random(BATCH, 9, CHANNELS)
    alpha = BorderInput(h, spec=spec(9, CHANNELS), statistic=statistic, feedback=None).alpha
    np.testing.assert_allclose(alpha.numpy(), by_numpy(h.numpy(), axis=1))
    tokens = BorderInput(h, spec=spec(9, CHANNELS, tokens=True), statistic=statistic, feedback=None).alpha
    assert tokens is h


def test_deviation_of_a_constant_is_zero_with_zero_gradient() -> None:
    h = torch.ones(2, CHANNELS, 3, requires_grad=True)
    deviation = bll.spatial_std(h)
    assert torch.equal(deviation, torch.zeros(2, CHANNELS))
    assert torch.equal(torch.autograd.grad(deviation.sum(), h)[0], torch.zeros_like(h))


def test_alpha_is_at_least_in_single_precision() -> None:
    for dtype, wide in [
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ]:
        h = torch.zeros(2, CHANNELS, 3, 3, dtype=dtype)
        message = BorderInput(h, spec=spec(CHANNELS, 3, 3), statistic=bll.spatial_mean, feedback=None)
        assert (message.statistics.dtype, message.alpha.dtype) == (dtype, wide)


def test_richer_statistics_are_those_of_numpy() -> None:
    h = random(BATCH, CHANNELS, 4, 6)
    positions = h.flatten(2)
    expected = np.concatenate([positions.numpy().mean(2), positions.numpy().std(2)], 1)
    np.testing.assert_allclose(bll.SpatialMoments()(positions).numpy(), expected)
    cells = [
        h[:, :, rows, columns].mean((2, 3)) for rows in (slice(2), slice(2, 4)) for columns in (slice(3), slice(3, 6))
    ]
    assert_close(bll.SpatialGrid(2)(h), torch.stack(cells, 2).flatten(1))
    with pytest.raises(ValueError, match="with at least 5 pixels per side"):
        bll.SpatialGrid(5)(h)


@pytest.mark.parametrize(("statistic", "per_channel"), [(bll.SpatialMoments(), 2), (bll.SpatialGrid(2), 4)])
@pytest.mark.parametrize("head", ["linear", "normalised", "mlp", "pooled", "evidence"])
def test_a_chain_learns_from_richer_statistics(statistic, per_channel: int, head: str) -> None:
    """The messages are wider, on both sides; vectors stay their own statistics."""
    torch.manual_seed(0)
    pooling = nn.Sequential(nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    blocks = [nn.Conv2d(3, 6, 3), pooling, nn.Linear(6, CLASSES)]
    x, y = torch.randn(12, 3, 8, 8), torch.arange(12) % CLASSES
    loss = bll.Variational() + bll.Predictive(head)
    if head == "pooled":
        blocks = [blocks[0], nn.Sequential(*pooling, blocks[2])]
    learner = bll.BlockLocal(blocks, classes=CLASSES, example=x, loss=loss, statistic=statistic)
    learner.backward(x, y)
    message, feedback = learner._border(0).message(learner.blocks[0](x)), learner._border(0).feedback
    assert feedback is not None
    assert message.alpha.shape == feedback(y).shape == (12, 6 * per_channel)
    means = torch.stack([message.alpha[y == c].mean(0) for c in range(CLASSES)])
    assert_close(feedback(torch.arange(CLASSES)), means.detach(), rtol=1e-3, atol=1e-3)
    if head != "pooled":
        assert learner._border(1).message(torch.randn(4, 6)).alpha.shape == (4, 6)


@pytest.mark.parametrize("learner", [bll.BlockLocal, bll.Hooked])
def test_chosen_borders_stand_where_the_statistic_can_be_taken(learner) -> None:
    """ResNet-8 can be cut after its average pooling, where a map of one pixel has no grid of 2x2 cells."""
    model = build("resnet8", channels=3, size=(8, 8), classes=CLASSES)
    x, y = torch.randn(4, 3, 8, 8), torch.arange(4) % CLASSES
    ours = learner(model, blocks=4, classes=CLASSES, example=x, statistic=bll.SpatialGrid(2))
    assert "avgpool" not in ours.cuts
    assert ours.backward(x, y).isfinite().all()
    with pytest.raises(ValueError, match="at least 9 pixels per side"):
        learner(model, blocks=2, classes=CLASSES, example=x, statistic=bll.SpatialGrid(9))


def test_a_grid_needs_a_map() -> None:
    blocks = [nn.Conv1d(3, 6, 3), nn.Sequential(nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(6, CLASSES))]
    with pytest.raises(ValueError, match=r"statistic=SpatialGrid\(size=2\) reads feature maps"):
        bll.BlockLocal(
            blocks, classes=CLASSES, example=torch.randn(2, 3, 8), layout="signal", statistic=bll.SpatialGrid()
        )
