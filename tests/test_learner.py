"""Learning in blocks: against plain PyTorch, which loss moves what, and one graph alive at a time."""

import copy
import math
import weakref
from functools import partial

import pytest
import torch
import zoo
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F
from torch.testing import assert_close

import blocklocal as bll
from blocklocal.losses import LocalLoss

CLASSES = 4
EVERYTHING = 0.1 * bll.Variational() + bll.Predictive() + bll.Predictive("evidence") + 0.5 * bll.Similarity()


def vision(loss: LocalLoss = bll.BLL, **options) -> bll.BlockLocal:
    model, x = zoo.residual()
    return bll.BlockLocal(model, at=["stem", "stages.0", "stages.1"], classes=CLASSES, example=x, loss=loss, **options)


def images(samples: int = 12, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(samples, 3, 8, 8, generator=generator), torch.arange(samples) % CLASSES


def perceptron(depth: int = 4, **options) -> bll.BlockLocal:
    blocks = [nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(depth - 1)]
    return bll.BlockLocal([*blocks, nn.Linear(6, CLASSES)], classes=CLASSES, example=torch.randn(2, 6), **options)


def vectors(samples: int = 16, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(samples, 6, generator=generator), torch.arange(samples) % CLASSES


def gradients(module: nn.Module) -> list[Tensor | None]:
    return [None if p.grad is None else p.grad.clone() for p in module.parameters()]


def test_one_block_is_plain_pytorch_bit_for_bit() -> None:
    torch.manual_seed(0)
    plain, _ = zoo.residual()
    model = copy.deepcopy(plain)
    learner = bll.BlockLocal(model, blocks=1, classes=CLASSES)
    ours, theirs = (torch.optim.SGD(m.parameters(), lr=0.05, momentum=0.9) for m in (learner, plain))
    for step in range(20):
        x, y = images(seed=step)
        torch.manual_seed(step)  # for dropout
        (loss,) = learner.backward(x, y)
        ours.step()
        ours.zero_grad()
        torch.manual_seed(step)
        expected = F.cross_entropy(plain(x), y)
        expected.backward()
        theirs.step()
        theirs.zero_grad()
        assert torch.equal(loss, expected.detach())
    for name, value in plain.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name


def test_two_blocks_are_the_method_written_out() -> None:
    """Fig. 2 by hand: class means as feedback, Eq. 6 for Gaussians, a linear head, no gradient across the border."""
    torch.manual_seed(0)
    learner = perceptron(
        2,
        loss=0.5 * bll.Variational() + bll.Predictive("linear"),
        feedback=bll.ClosedFormFeedback(ridge=1e-9, forgetting=0.0),
    )
    first, last = (copy.deepcopy(block) for block in learner.blocks)
    head = copy.deepcopy(learner.borders[0].get_submodule("terms.1.head.linear"))
    ours = torch.optim.SGD(learner.parameters(), lr=0.1, momentum=0.9)
    theirs = torch.optim.SGD([p for m in (first, head, last) for p in m.parameters()], lr=0.1, momentum=0.9)
    for step in range(20):
        x, y = vectors(seed=step)
        losses = learner.backward(x, y)
        ours.step()
        ours.zero_grad()
        h = first(x)
        beta = torch.stack([h[y == c].mean(0) for c in range(CLASSES)])[y].detach()
        constant = h.shape[1] * (math.log(2) / 2 - 1 / 4 + math.log(2 * math.pi * math.e) / 2)
        local = 0.5 * (((h - beta) ** 2).sum(1).mean() / 8 + constant) + F.cross_entropy(head(h), y)
        final = F.cross_entropy(last(h.detach()), y)
        (local + final).backward()
        theirs.step()
        theirs.zero_grad()
        assert_close(losses, torch.stack([local, final]).detach())
    for ours_, theirs_ in zip(learner.blocks, (first, last), strict=True):
        assert_close(list(ours_.parameters()), list(theirs_.parameters()))


@pytest.mark.parametrize("feedback", [bll.ClosedFormFeedback(), bll.GradientFeedback()], ids=lambda f: type(f).__name__)
def test_each_loss_reaches_its_own_block_and_border_alone(feedback) -> None:
    learner = vision(EVERYTHING, feedback=feedback)
    parameters = list(learner.parameters())
    for k, loss in enumerate(learner(*images())):
        found = torch.autograd.grad(loss, parameters, allow_unused=True, retain_graph=True)
        reached = {p for p, gradient in zip(parameters, found, strict=True) if gradient is not None}
        assert reached == set(learner.block_parameters(k))
    assert sum(len(learner.block_parameters(k)) for k in range(4)) == len(parameters)


@pytest.mark.parametrize("feedback", [bll.ClosedFormFeedback(), bll.GradientFeedback()], ids=lambda f: type(f).__name__)
def test_every_parameter_moves_by_its_own_loss(feedback) -> None:
    torch.manual_seed(0)
    learner = vision(EVERYTHING, feedback=feedback)
    fitted = [name for name, _ in learner.named_parameters() if ".feedback." in name]
    assert len(fitted) == (3 * 4 if isinstance(feedback, bll.GradientFeedback) else 0)
    for k in range(4):
        before = {name: p.detach().clone() for name, p in learner.named_parameters()}
        optimizer = torch.optim.SGD(learner.parameters(), lr=0.1)
        for step in range(3):
            optimizer.zero_grad()
            learner(*images(seed=step))[k].backward()
            optimizer.step()
        moved = {name for name, p in learner.named_parameters() if not torch.equal(p, before[name])}
        assert moved == {name for name in before if name.startswith((f"blocks.{k}.", f"borders.{k}."))}


@settings(max_examples=8)
@given(st.sampled_from([zoo.residual, zoo.inception, zoo.preactivation, zoo.transformer, zoo.encoder]), st.data())
def test_backward_is_one_backward_of_the_sum(make, data: st.DataObject) -> None:
    torch.manual_seed(0)
    model, x = make()
    y = torch.randint(CLASSES, x.shape if make is zoo.transformer else x.shape[:1])
    blocks = data.draw(st.integers(1, 4))
    ours = bll.BlockLocal(model, blocks=blocks, classes=CLASSES, example=x, balance="memory")
    theirs = copy.deepcopy(ours)
    torch.manual_seed(1)
    losses = ours.backward(x, y)
    torch.manual_seed(1)
    total = sum(theirs(x, y))
    assert isinstance(total, Tensor)
    total.backward()
    assert_close(losses.sum(), total.detach())
    assert all(g is not None for g in gradients(ours))
    assert_close(gradients(ours), gradients(theirs), rtol=0, atol=0)
    for name, buffer in theirs.named_buffers():
        assert torch.equal(ours.get_buffer(name), buffer), name


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.SGD])
def test_one_optimizer_per_block_is_one_over_all(kind) -> None:
    torch.manual_seed(0)
    together = vision()
    apart = copy.deepcopy(together)
    optimizer = kind(together.parameters(), lr=0.01)
    optimizers = [kind(apart.block_parameters(k), lr=0.01) for k in range(4)]
    for step in range(4):
        torch.manual_seed(step)
        expected = together.backward(*images(seed=step))
        optimizer.step()
        optimizer.zero_grad()
        torch.manual_seed(step)
        losses = apart.backward(*images(seed=step), optimizers=optimizers)
        assert torch.equal(losses, expected)
        assert all(p.grad is None for p in apart.parameters())
    for name, value in together.state_dict().items():
        assert torch.equal(apart.state_dict()[name], value), name
    with pytest.raises(ValueError, match="3 optimizers for 4 blocks: pass one per block"):
        apart.backward(*images(), optimizers=optimizers[:3])


def test_accumulation_is_the_gradient_of_the_whole_batch() -> None:
    learner = perceptron(loss=bll.Variational() + bll.Predictive(), feedback=bll.GradientFeedback())
    x, y = vectors(24)
    whole_losses = learner.backward(x, y)
    whole = gradients(learner)
    learner.zero_grad()
    parts = [learner.backward(x[i::3], y[i::3], scale=1 / 3) for i in range(3)]
    assert_close(gradients(learner), whole)
    assert_close(torch.stack(parts).mean(0), whole_losses)
    learner.zero_grad()
    learner.backward(x, y, scale=torch.tensor(1024.0))
    assert_close(gradients(learner), [1024 * g for g in whole if g is not None], rtol=1e-4, atol=1e-4)


def test_a_frozen_block_learns_nothing_and_the_others_as_ever() -> None:
    torch.manual_seed(0)
    free = perceptron()
    frozen = copy.deepcopy(free)
    for p in frozen.block_parameters(1):
        p.requires_grad_(False)
    assert torch.equal(frozen.backward(*vectors()), free.backward(*vectors()))
    for k in range(4):
        for ours, theirs in zip(frozen.block_parameters(k), free.block_parameters(k), strict=True):
            assert ours.grad is None if k == 1 else torch.equal(ours.grad, theirs.grad)  # type: ignore[arg-type]


def test_training_pulls_alpha_toward_beta() -> None:
    learner = perceptron(2, loss=bll.Variational())
    x, y = vectors()
    learner.local(0, x, y)  # fits the feedback
    learner.eval()  # and keeps it
    beta = learner.borders[0].get_submodule("feedback")(y)
    distance = (learner.blocks[0](x) - beta).norm()
    optimizer = torch.optim.SGD(learner.parameters(), lr=0.5)
    for _ in range(30):
        optimizer.zero_grad()
        learner.backward(x, y)
        optimizer.step()
    assert (learner.blocks[0](x) - beta).norm() < 0.8 * distance


class Saved:
    """What autograd keeps of one tensor."""

    def __init__(self, tensor: Tensor, block: int) -> None:
        self.tensor, self.block = tensor, block


def test_one_graph_is_alive_at_a_time() -> None:
    learner = perceptron(8)
    running: list[int] = []
    alive: weakref.WeakSet[Saved] = weakref.WeakSet()
    peaks: list[tuple[int, int]] = []
    for k, block in enumerate(learner.blocks):
        block.register_forward_pre_hook(partial(lambda k, module, inputs: running.append(k), k))

    def pack(tensor: Tensor) -> Saved:
        saved = Saved(tensor, running[-1])
        alive.add(saved)
        peaks.append((len(alive), len({other.block for other in alive})))
        return saved

    def step(how) -> tuple[int, ...]:
        peaks.clear()
        with saved_tensors_hooks(pack, lambda saved: saved.tensor):
            how(*vectors())
        assert not alive
        return tuple(map(max, zip(*peaks, strict=True)))

    saved_apart, blocks_apart = step(learner.backward)
    saved_together, blocks_together = step(lambda x, y: sum(learner(x, y)).backward())  # type: ignore[union-attr]
    assert (blocks_apart, blocks_together) == (1, 8)
    assert saved_apart < 0.25 * saved_together


@pytest.mark.parametrize("first", [nn.ReLU(inplace=True), nn.Dropout(0.5, inplace=True)], ids=["relu", "dropout"])
def test_a_block_that_writes_into_its_input_gets_a_copy(first: nn.Module) -> None:
    blocks = [nn.Sequential(nn.Linear(6, 6), nn.Tanh()), nn.Sequential(first, nn.Linear(6, CLASSES))]
    learner = bll.BlockLocal(blocks, classes=CLASSES, example=torch.randn(2, 6))
    x, y = vectors()
    _, h = learner.local(0, x, y)
    before = h.clone()
    learner.local(1, h, y)
    assert torch.equal(h, before)
    sum(learner(x, y)).backward()  # type: ignore[union-attr]  (autograd refuses if it was written to)


def test_nan_stays_visible() -> None:
    learner = perceptron()
    x, y = vectors()
    x[3, 2] = float("nan")
    assert learner.backward(x, y).isnan().all()
    assert torch.stack(learner(x, y)).isnan().all()
