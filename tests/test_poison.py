"""No batch spoils a learner for those that follow: nan, infinity, overflow, and nothing at all."""

import copy
import math
import warnings

import pytest
import torch
import zoo
from torch import Tensor, nn
from torch.testing import assert_close

import blocklocal as bll
from blocklocal.candidates import candidates
from blocklocal.feedback import LinearFeedback, Targets

CLASSES, CHANNELS = 3, 4
IMMENSE = 1e30  # finite in single precision, its square is not


def fitted(*batches: tuple[Tensor, Tensor], labels: bool, forgetting: float = 0.9) -> LinearFeedback:
    feedback = bll.ClosedFormFeedback(forgetting=forgetting).build(Targets(CLASSES, labels=labels), channels=CHANNELS)
    for y, alpha in batches:
        feedback.fit(y, alpha)
    return feedback


def batch(seed: int, *, labels: bool, samples: int = 12) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(samples) % CLASSES if labels else torch.randn(samples, CLASSES, generator=generator)
    return y, torch.randn(samples, CHANNELS, generator=generator)


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(value, b.state_dict()[name]) for name, value in a.state_dict().items())


@pytest.mark.parametrize("labels", [True, False], ids=["labels", "dense"])
@pytest.mark.parametrize("forgetting", [0.0, 0.9])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, IMMENSE])
def test_what_is_not_finite_does_not_count(labels: bool, forgetting: float, bad: float) -> None:
    first, (y, alpha), last = (batch(seed, labels=labels) for seed in range(3))
    spoilt, counts = alpha.clone(), torch.ones(len(alpha), dtype=torch.bool)
    for row in (0, 5):
        spoilt[row, row % CHANNELS], counts[row] = bad, False
    feedback = fitted(first, (y, spoilt), last, labels=labels, forgetting=forgetting)
    expected = fitted(first, (y[counts], alpha[counts]), last, labels=labels, forgetting=forgetting)
    for name, value in expected.state_dict().items():
        assert_close(feedback.state_dict()[name], value, msg=name)


def test_a_dense_target_that_is_not_finite_does_not_count() -> None:
    y, alpha = batch(0, labels=False)
    y[3, 1], y[7, 0] = math.nan, math.inf
    counts = y.isfinite().all(1)
    assert_close(fitted((y, alpha), labels=False).weight, fitted((y[counts], alpha[counts]), labels=False).weight)


def test_a_batch_without_a_finite_sample_leaves_the_weight_alone() -> None:
    for labels in (True, False):
        feedback = fitted(batch(0, labels=labels), labels=labels)
        before = feedback.weight.clone()
        feedback.fit(batch(1, labels=labels)[0], torch.full((12, CHANNELS), math.nan))
        assert_close(feedback.weight, before, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("labels", [True, False], ids=["labels", "dense"])
def test_what_counts_is_found_the_same_way_on_every_device(labels: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU samples are left out without asking whether there are such: to the bit the same where there are none."""
    batches = [batch(seed, labels=labels) for seed in range(4)]
    asked = fitted(*batches, labels=labels)
    monkeypatch.setattr(Tensor, "is_cpu", False)
    assert same(fitted(*batches, labels=labels), asked)


def test_targets_that_repeat_each_other_have_a_fit() -> None:
    """Of two equal columns the Gram matrix is singular, and rounding takes a small ridge away."""
    column = 100 * torch.randn(5_000, 1)
    y, alpha = column.repeat(1, CLASSES), torch.randn(5_000, CHANNELS) + column
    feedback = fitted(*[(y, alpha)] * 20, labels=False)
    assert_close(feedback(y), column.expand(-1, CHANNELS), rtol=1e-2, atol=1e-1)


def learner(**options) -> bll.BlockLocal:
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Linear(6, 8), nn.Tanh()), nn.Linear(8, 8), nn.Linear(8, CLASSES)]
    return bll.BlockLocal(blocks, classes=CLASSES, example=torch.randn(2, 6), **options)


def data(seed: int = 0, samples: int = 12) -> tuple[Tensor, Tensor]:
    return torch.randn(samples, 6, generator=torch.Generator().manual_seed(seed)), torch.arange(samples) % CLASSES


@pytest.mark.parametrize("forgetting", [0.0, 0.9])
def test_a_learner_recovers_from_a_batch_with_nan(forgetting: float) -> None:
    one = learner(feedback=bll.ClosedFormFeedback(forgetting=forgetting))
    x, y = data()
    x[2, 3] = math.nan
    assert one.backward(x, y).isnan().all()
    one.zero_grad()
    assert one.backward(*data(1)).isfinite().all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in one.parameters())


def test_a_batch_with_nan_is_diagnosed_by_its_finite_samples() -> None:
    one = learner()
    one.backward(*data())
    x, y = data(1)
    whole = one.diagnose(x[1:], y[1:])
    x[0] = math.nan
    for report, expected in zip(one.diagnose(x, y), whole, strict=True):
        assert math.isnan(report["predictive"])
        assert report["variance_ratio"] == pytest.approx(expected["variance_ratio"])
        assert report["agreement"] == pytest.approx(expected["agreement"])
    with pytest.warns(bll.CollapseWarning, match="returns no finite number"):
        one.diagnose(torch.full_like(x, math.nan), y)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_nothing_learns_where_no_gradient_is_recorded(context) -> None:
    one = learner()
    one.backward(*data())
    before, (x, y) = copy.deepcopy(one), data(1)
    with context(), pytest.raises(ValueError, match="backward needs gradients"):
        one.backward(x, y)
    with context():
        losses = one(x, y)
    assert same(one, before)
    assert all(torch.equal(a, b) for a, b in zip(losses, before.eval()(x, y), strict=True))
    with context():
        x = x.clone()
    if x.is_inference():
        with pytest.raises(ValueError, match=r"x was made in torch\.inference_mode"):
            one.backward(x, y)
        assert same(one, before)


@pytest.mark.parametrize("blocks", [1, None])
def test_an_empty_batch_is_refused(blocks: int | None) -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, CLASSES))
    one = bll.BlockLocal(model, blocks=blocks, classes=CLASSES, example=torch.randn(2, 6))
    before, (x, y) = copy.deepcopy(one), data(samples=0)
    for call in (one, one.backward, one.diagnose):
        with pytest.raises(ValueError, match="an empty batch has no loss"):
            call(x, y)
    assert same(one, before)
    assert one.predict(x).shape == (0, CLASSES)


def gradient_steps(one: bll.BlockLocal, *, optimizers, scaler, batches, plain: bool) -> None:
    for x, y in batches:
        if plain:
            losses = one(x, y)
            for loss, optimizer in zip(losses, optimizers, strict=True):
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                optimizer.zero_grad()
        else:
            one.backward(x, y, optimizers=optimizers, scaler=scaler)
        scaler.update()


def test_a_scaler_steps_as_a_plain_loop_to_the_bit() -> None:
    twins = [learner() for _ in range(2)]
    batches = [data(seed) for seed in range(6)]
    batches[2][0][1] = math.inf  # an overflow: every step is skipped, and the scale falls
    batches[4][0][0] = 1e25  # and one that the first block alone survives
    scalers = [torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=2) for _ in twins]
    for one, scaler, plain in zip(twins, scalers, (True, False), strict=True):
        optimizers = [torch.optim.SGD(one.block_parameters(k), lr=0.05, momentum=0.9) for k in range(3)]
        gradient_steps(one, optimizers=optimizers, scaler=scaler, batches=batches, plain=plain)
    assert same(*twins)
    assert scalers[0].get_scale() == scalers[1].get_scale()
    assert all(value.isfinite().all() for value in twins[0].state_dict().values())


def test_a_scaler_scales_without_optimizers() -> None:
    ours, theirs, (x, y) = learner(), learner(), data()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    losses = ours.backward(x, y, scaler=scaler, scale=0.5)
    assert torch.equal(losses, theirs.backward(x, y, scale=512.0))
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)  # type: ignore[arg-type]


def test_a_frozen_block_is_no_matter_to_a_scaler() -> None:
    one = learner()
    for p in one.block_parameters(1):
        p.requires_grad_(False)
    optimizers = [torch.optim.SGD(one.block_parameters(k), lr=0.05) for k in range(3)]
    scaler = torch.amp.GradScaler("cpu")
    assert one.backward(*data(), optimizers=optimizers, scaler=scaler).isfinite().all()
    scaler.update()


@pytest.mark.parametrize("scale", [0.5, torch.tensor(1.0)], ids=str)
def test_scaled_gradients_are_not_stepped(scale: float | Tensor) -> None:
    one = learner()
    before = copy.deepcopy(one)
    optimizers = [torch.optim.SGD(one.block_parameters(k), lr=0.05) for k in range(3)]
    with pytest.raises(ValueError, match=r"scale=.* would make steps with scaled gradients: pass scaler="):
        one.backward(*data(), scale=scale, optimizers=optimizers)
    assert same(one, before)


def test_a_loss_that_moves_nothing_is_told() -> None:
    one = learner(criterion=lambda prediction, y: (prediction.argmax(-1) != y).float().mean())
    with pytest.raises(ValueError, match=r"loss of block 2 depends on none of its parameters: is criterion="):
        one.backward(*data())


def test_no_warning_of_collapse_without_one() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", bll.CollapseWarning)
        learner().diagnose(*data())


@pytest.mark.parametrize("make", zoo.MODELS)
@pytest.mark.parametrize("autocast", [False, True])
def test_a_step_reads_no_memory_that_was_never_written(make, autocast: bool) -> None:
    """As the gradients of some convolutions in bf16 were."""
    gradients = []
    for value in (math.nan, 0.0):
        torch.manual_seed(0)
        model, x = make()
        at, terms = candidates(model, example=x), bll.Variational() + bll.Predictive()
        learner = bll.BlockLocal(model, at=at, classes=4, example=x, loss=terms)
        y, h = model(x)[..., 0].long().zero_(), x
        for k in range(len(learner.blocks)):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss, h = learner.local(k, h, y)
            zoo.leave_behind(value)
            loss.backward()
        gradients.append([p.grad for p in learner.parameters() if p.grad is not None])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))
