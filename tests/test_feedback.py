"""Feedback: its closed form against least squares and class means, its gradient fit against its closed form."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close

import blocklocal as bll
from blocklocal.feedback import LinearFeedback, Targets

CLASSES, CHANNELS = 5, 4


def linear(*, labels: bool, ridge: float = 1e-3, forgetting: float = 0.0, dtype: torch.dtype = torch.float64):
    settings = bll.ClosedFormFeedback(ridge=ridge, forgetting=forgetting)
    return settings.build(Targets(CLASSES, labels=labels), channels=CHANNELS).to(dtype)


def batches(seed: int, *, labels: bool, steps: int = 4, samples: int = 24) -> list[tuple[Tensor, Tensor]]:
    """Targets and alphas; every class is in every batch."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(steps):
        y = torch.arange(samples) % CLASSES
        if not labels:
            y = (torch.rand(samples, CLASSES, generator=generator) < 0.5).double()  # several labels per sample
        made.append((y, torch.randn(samples, CHANNELS, generator=generator, dtype=torch.float64)))
    return made


def dense(y: Tensor) -> Tensor:
    return y if y.is_floating_point() else F.one_hot(y, CLASSES).double()


def weighted_ridge(data: list[tuple[Tensor, Tensor]], *, ridge: float, forgetting: float, start: Tensor) -> Tensor:
    """argmin of sum_t g^(T-t) |Y_t W - A_t|^2 + r |W - start|^2, as one stacked least-squares problem."""
    ages = range(len(data))[::-1]
    rows = [forgetting ** (age / 2) * dense(y) for age, (y, _) in zip(ages, data, strict=True)]
    values = [forgetting ** (age / 2) * a for age, (_, a) in zip(ages, data, strict=True)]
    rows.append(ridge**0.5 * torch.eye(CLASSES, dtype=torch.float64))
    values.append(ridge**0.5 * start)
    return torch.linalg.lstsq(torch.cat(rows), torch.cat(values)).solution


@pytest.mark.parametrize("labels", [True, False], ids=["labels", "multi-label"])
@given(seed=st.integers(0, 2**31), ridge=st.floats(1e-4, 10.0))
def test_first_fit_is_ridge_regression(labels: bool, seed: int, ridge: float) -> None:
    ((y, alpha),) = batches(seed, labels=labels, steps=1)
    feedback = linear(labels=labels, ridge=ridge)
    feedback.fit(y, alpha)
    start = torch.zeros(CLASSES, CHANNELS, dtype=torch.float64)
    expected = weighted_ridge([(y, alpha)], ridge=ridge, forgetting=0.0, start=start)
    assert_close(feedback.weight, expected)
    assert_close(feedback(y), dense(y) @ expected)


@pytest.mark.parametrize("labels", [True, False], ids=["labels", "multi-label"])
@given(seed=st.integers(0, 2**31), forgetting=st.floats(0.0, 0.99), ridge=st.floats(1e-4, 10.0))
def test_forgetting_is_weighted_least_squares(labels: bool, seed: int, forgetting: float, ridge: float) -> None:
    data, feedback = batches(seed, labels=labels), linear(labels=labels, ridge=ridge, forgetting=forgetting)
    for t, (y, alpha) in enumerate(data, start=1):
        start = feedback.weight.clone()
        feedback.fit(y, alpha)
        expected = weighted_ridge(data[:t], ridge=ridge, forgetting=forgetting, start=start)
        assert_close(feedback.weight, expected)


def test_labels_give_class_means() -> None:
    ((y, alpha),) = batches(0, labels=True, steps=1)
    feedback = linear(labels=True, ridge=1e-12)
    feedback.fit(y, alpha)
    for c in range(CLASSES):
        assert_close(feedback.weight[c], alpha[y == c].mean(0))


def test_tokens_are_samples() -> None:
    generator = torch.Generator().manual_seed(0)
    y = torch.randint(CLASSES, (3, 7), generator=generator)
    alpha = torch.randn(3, 7, CHANNELS, generator=generator, dtype=torch.float64)
    tokens, samples = linear(labels=True), linear(labels=True)
    tokens.fit(y, alpha)
    samples.fit(y.flatten(), alpha.flatten(0, 1))
    assert torch.equal(tokens.weight, samples.weight)
    assert_close(tokens.weight[2], alpha[y == 2].mean(0), atol=1e-2, rtol=0)
    assert torch.equal(tokens(y)[1, 4], tokens.weight[y[1, 4]])


def test_dense_tokens_are_samples() -> None:
    y, alpha = torch.rand(3, 7, CLASSES, dtype=torch.float64), torch.rand(3, 7, CHANNELS, dtype=torch.float64)
    tokens, samples = linear(labels=False), linear(labels=False)
    tokens.fit(y, alpha)
    samples.fit(y.flatten(0, 1), alpha.flatten(0, 1))
    assert torch.equal(tokens.weight, samples.weight)
    assert tokens(y).shape == (3, 7, CHANNELS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_absent_classes_are_untouched_to_the_bit(dtype: torch.dtype) -> None:
    feedback = linear(labels=True, forgetting=0.9, dtype=dtype)
    feedback.fit(torch.arange(20) % CLASSES, torch.randn(20, CHANNELS))
    before = feedback.weight.clone()
    assert before.abs().amin(1).gt(0).all()
    for _ in range(2_000):  # far past the step at which the forgotten counts underflow
        feedback.fit(torch.tensor([0, 1, 1]), torch.randn(3, CHANNELS))
    assert torch.equal(feedback.weight[2:], before[2:])
    assert not torch.isclose(feedback.weight[:2], before[:2]).all(1).any()
    alpha = torch.randn(1, CHANNELS)
    feedback.fit(torch.tensor([3]), alpha)  # the class is back: one sample of it is all the evidence there is
    assert_close(feedback.weight[3].float(), alpha[0], atol=2e-2, rtol=2e-2)


def test_directions_that_dense_targets_leave_out_are_kept() -> None:
    feedback = linear(labels=False, forgetting=0.9)
    feedback.fit(torch.rand(40, CLASSES), torch.randn(40, CHANNELS))
    for _ in range(500):  # let the first batch fade, so that the fit of what it alone excited has settled
        feedback.fit(torch.rand(8, CLASSES) * torch.tensor([1.0, 1, 1, 1, 0]), torch.randn(8, CHANNELS))
    before = feedback.weight[4].clone()
    for _ in range(500):
        feedback.fit(torch.rand(8, CLASSES) * torch.tensor([1.0, 1, 1, 1, 0]), torch.randn(8, CHANNELS))
    assert before.abs().max() > 1e-2
    assert_close(feedback.weight[4], before, atol=1e-9, rtol=0)


def test_classes_may_outnumber_the_batch() -> None:
    feedback = bll.ClosedFormFeedback(forgetting=0.0).build(Targets(1000, labels=True), channels=CHANNELS)
    prototypes = torch.randn(1000, CHANNELS)
    for y in torch.randperm(1000).split(8):
        feedback.fit(y, prototypes[y])
    assert_close(feedback.weight, prototypes / (1 + feedback.ridge))


def test_gradient_fit_of_one_layer_finds_the_closed_form() -> None:
    """Gradient descent on the Variational loss alone, alpha fixed: the optimum is the class mean."""
    torch.manual_seed(0)
    y, alpha = torch.arange(30) % CLASSES, torch.randn(30, CHANNELS)
    learner = bll.BlockLocal(
        [torch.nn.Identity(), torch.nn.Linear(CHANNELS, CLASSES)],
        classes=CLASSES,
        example=alpha,
        loss=bll.Variational(),
        feedback=bll.GradientFeedback(depth=1),
    )
    feedback = learner.borders[0].get_submodule("feedback")
    optimizer = torch.optim.LBFGS(feedback.parameters(), lr=1, max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        return learner.backward(alpha, y)[0]

    optimizer.step(closure)  # type: ignore[arg-type]
    closed = linear(labels=True, ridge=1e-9, dtype=torch.float32)
    closed.fit(y, alpha)
    assert_close(feedback(torch.arange(CLASSES)), closed.weight, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_depth_and_width(depth: int) -> None:
    network = bll.GradientFeedback(depth=depth, width=7).build(Targets(CLASSES, labels=True), channels=CHANNELS)
    sizes = [tuple(p.shape) for p in network.parameters() if p.dim() == 2]
    assert sizes == [(7, CLASSES), *[(7, 7)] * (depth - 2), (CHANNELS, 7)] if depth > 1 else [(CHANNELS, CLASSES)]
    assert network(torch.tensor([[0, 1, 2], [4, 4, 0]])).shape == (2, 3, CHANNELS)


def test_dense_and_label_networks_agree() -> None:
    by_label = bll.GradientFeedback().build(Targets(CLASSES, labels=True), channels=CHANNELS)
    by_vector = bll.GradientFeedback().build(Targets(CLASSES, labels=False), channels=CHANNELS)
    by_vector.load_state_dict(by_label.state_dict())
    y = torch.arange(CLASSES)
    assert torch.equal(by_label(y), by_vector(F.one_hot(y, CLASSES).float()))


@pytest.mark.parametrize("labels", [True, False], ids=["labels", "multi-label"])
def test_autocast_changes_nothing(labels: bool) -> None:
    """Statistics and messages are sums over samples: they stay in single precision."""
    ((y, alpha),) = batches(3, labels=labels, steps=1)
    plain, cast = linear(labels=labels, dtype=torch.float32), linear(labels=labels, dtype=torch.float32)
    plain.fit(y, alpha.float())
    with torch.autocast("cpu", torch.bfloat16):
        cast.fit(y, alpha.float())
        message = cast(y)
    assert torch.equal(plain.weight, cast.weight)
    assert torch.equal(plain(y), message)


@pytest.mark.parametrize("labels", [True, False], ids=["labels", "multi-label"])
def test_half_precision_loses_only_rounding(labels: bool) -> None:
    """Counts beyond 256 have no bfloat16, and no solver takes one: the fit is made in single precision."""
    y, alpha = batches(4, labels=labels, steps=1, samples=4_000)[0]
    exact, half = linear(labels=labels), linear(labels=labels, dtype=torch.bfloat16)
    exact.fit(y, alpha)
    half.fit(y, alpha.float())
    assert half.weight.dtype is torch.float32
    assert_close(half.weight.double(), exact.weight, atol=1e-5, rtol=1e-4)


def test_statistics_never_get_a_gradient() -> None:
    feedback = linear(labels=True)
    alpha = torch.randn(3, CHANNELS, dtype=torch.float64, requires_grad=True)
    feedback.fit(torch.tensor([0, 1, 2]), alpha)
    assert not feedback(torch.tensor([0])).requires_grad
    assert set(feedback.state_dict()) == {"weight", "second", "cross"}
    assert isinstance(feedback, LinearFeedback)
    assert not list(feedback.parameters())


@pytest.mark.parametrize(
    ("targets", "y", "message"),
    [
        (Targets(3, labels=True), torch.tensor([0, 3]), "labels run from 0 to 3, but must be from 0 to 2"),
        (Targets(3, labels=True), torch.tensor([-1, 2]), "labels run from -1 to 2"),
        (Targets(3, labels=True), torch.tensor([0.0, 1.0]), "labels are integers.*outputs="),
        (Targets(3, labels=True), torch.tensor([True]), "torch.bool"),
        (Targets(3, labels=True), torch.tensor([1], dtype=torch.int32), "int32.*long"),
        (Targets(3, labels=False), torch.zeros(4, 2), r"shape \(4, 2\): dense targets need 3 in the last dimension"),
        (Targets(3, labels=False), torch.zeros(()), "dense targets need 3"),
    ],
)
def test_targets_are_refused(targets: Targets, y: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        targets.check(y)


def test_targets_are_accepted() -> None:
    Targets(3, labels=True).check(torch.tensor([[0, 1], [2, 2]]))
    Targets(3, labels=False).check(torch.zeros(4, 3))


def test_settings_are_refused() -> None:
    for ridge in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="ridge > 0"):
            bll.ClosedFormFeedback(ridge=ridge)
    for forgetting in (1.0, -0.1):
        with pytest.raises(ValueError, match="0 <= forgetting < 1"):
            bll.ClosedFormFeedback(forgetting=forgetting)
    with pytest.raises(ValueError, match="depth >= 1"):
        bll.GradientFeedback(depth=0)
