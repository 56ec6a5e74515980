"""Heads behind copies of the next unit: what they compute, when they are refreshed, and that nothing flows back."""

import copy

import pytest
import torch
import zoo
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD
from torch.testing import assert_close

import blocklocal as bll
from blocklocal.lookahead import LookaheadHead

CLASSES = 4


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, CLASSES)

    def forward(self, h: Tensor) -> Tensor:
        return self.linear(h.mean((2, 3)))


def chain(lookahead: bll.Lookahead, *, units: int = 2) -> tuple[bll.BlockLocal, Tensor, Tensor]:
    """A convolution, then two residual units in one block, or in one each, then the classifier."""
    torch.manual_seed(0)
    residual = [zoo.Residual(6, 6, stride=1), zoo.Residual(6, 8, stride=2)]
    rest = [nn.Sequential(*residual)] if units == 2 else residual
    blocks = [nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.Tanh()), *rest]
    blocks[-1] = nn.Sequential(*blocks[-1:], Classifier())
    x, y = torch.randn(6, 3, 8, 8), torch.arange(6) % CLASSES
    return bll.BlockLocal(blocks, classes=CLASSES, example=x[:2], loss=bll.Predictive(lookahead)), x, y


def head(learner: bll.BlockLocal, k: int = 0) -> LookaheadHead:
    found = learner._border(k).predictive.head
    assert isinstance(found, LookaheadHead)
    return found


def weights(module: nn.Module | None) -> list[Tensor]:
    assert module is not None
    return [parameter.detach().clone() for parameter in module.parameters()]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("units", [1, 2])
def test_the_block_learns_what_the_next_unit_can_use(units: int) -> None:
    learner, x, y = chain(bll.Lookahead("linear", refresh=1), units=units)
    plain = copy.deepcopy(learner)
    loss, _ = learner.local(0, x, y)
    found = torch.autograd.grad(loss, list(learner.blocks[0].parameters()))
    unit = next(module for module in plain.blocks[1].modules() if isinstance(module, zoo.Residual))
    features = unit(plain.blocks[0](x)).mean((2, 3))
    linear = head(plain).head.get_submodule("linear")
    expected = F.cross_entropy(linear(features), y)
    assert_close(loss, expected)
    assert_close(found, torch.autograd.grad(expected, list(plain.blocks[0].parameters())))


def test_a_frozen_copy_is_refreshed_every_so_many_steps_and_nothing_flows_back() -> None:
    learner, x, y = chain(bll.Lookahead(refresh=3), units=1)
    optimizers = [SGD(learner.block_parameters(k), lr=0.1) for k in range(3)]
    before = []
    for _ in range(7):
        before.append(weights(learner.blocks[1]))
        copied = weights(head(learner).frozen)
        learner.backward(x, y, optimizers=optimizers)
        changed = not same(copied, weights(head(learner).frozen))
        assert changed == (len(before) in (4, 7))
        assert same(weights(head(learner).frozen), before[(len(before) - 1) // 3 * 3])
    with torch.no_grad():
        learner(x, y)
    learner.eval()(x, y)
    assert head(learner).steps == 7
    learner.train().zero_grad()
    loss, _ = learner.local(0, x, y)
    loss.backward()
    assert all(parameter.grad is None for parameter in learner.blocks[1].parameters())
    frozen = head(learner).frozen
    assert frozen is not None
    assert all(parameter.grad is None for parameter in frozen.parameters())


def test_a_trained_copy_learns_and_a_mean_of_both_is_seen() -> None:
    learner, x, y = chain(bll.Lookahead(refresh=None))
    assert head(learner).frozen is None
    start = weights(head(learner).trained)
    learner.backward(x, y, optimizers=[SGD(learner.block_parameters(k), lr=0.1) for k in range(2)])
    assert not same(start, weights(head(learner).trained))
    both, x, y = chain(bll.Lookahead("linear", refresh=5, trainable=True))
    plain = copy.deepcopy(both)
    h = plain.blocks[0](x)
    frozen, trained = head(plain).frozen, head(plain).trained
    assert frozen is not None
    assert trained is not None
    features = ((frozen(h) + trained(h)) / 2).mean((2, 3))
    assert_close(both.local(0, x, y)[0], F.cross_entropy(head(plain).head.get_submodule("linear")(features), y))


def test_state_goes_on_to_the_bit() -> None:
    learner, x, y = chain(bll.Lookahead(refresh=3), units=1)
    optimizers = [SGD(learner.block_parameters(k), lr=0.1) for k in range(3)]
    for _ in range(2):
        learner.backward(x, y, optimizers=optimizers)
    other, _, _ = chain(bll.Lookahead(refresh=3), units=1)
    other.load_state_dict(learner.state_dict())
    others = [SGD(other.block_parameters(k), lr=0.1) for k in range(3)]
    for _ in range(4):
        assert torch.equal(learner.backward(x, y, optimizers=optimizers), other.backward(x, y, optimizers=others))


def test_the_next_unit_must_keep_the_layout_and_be_in_this_process() -> None:
    blocks = [nn.Conv2d(3, 6, 3), nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, CLASSES))]
    x = torch.randn(2, 3, 8, 8)
    with pytest.raises(ValueError, match=r"the next one turns \(2, 6, 6, 6\) into \(2, 4\)"):
        bll.BlockLocal(blocks, classes=CLASSES, example=x, loss=bll.Predictive(bll.Lookahead()))
    blocks = [nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Sequential(nn.Flatten(), nn.Linear(216, CLASSES))]
    with pytest.raises(ValueError, match="the next block has none"):
        bll.BlockLocal(blocks, classes=CLASSES, example=x, loss=bll.Predictive(bll.Lookahead()))
    with pytest.raises(ValueError, match="head='fancy' is unknown"):
        bll.Lookahead("fancy")
    with pytest.raises(ValueError, match="refresh=0"):
        bll.Lookahead(refresh=0)


def test_other_weights_of_the_next_block_are_noticed() -> None:
    learner, x, y = chain(bll.Lookahead(refresh=1), units=1)
    learner.local(0, x, y)
    unit = next(module for module in learner.blocks[1].modules() if isinstance(module, zoo.Residual))
    unit.conv1.weight = nn.Parameter(unit.conv1.weight.detach().clone())
    learner.local(0, x, y)  # which the copy sees too, since modules are shared
    assert any(torch.equal(copied, unit.conv1.weight) for copied in weights(head(learner).frozen))


def test_pooling_before_the_classifier_is_no_part_of_the_unit() -> None:
    torch.manual_seed(0)
    pooling = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, CLASSES)
    unit = nn.Sequential(nn.Conv2d(6, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
    blocks = [nn.Conv2d(3, 6, 3), nn.Sequential(*unit, *pooling)]
    x = torch.randn(2, 3, 8, 8)
    learner = bll.BlockLocal(blocks, classes=CLASSES, example=x, loss=bll.Predictive(bll.Lookahead(refresh=1)))
    frozen = head(learner.eval()).frozen
    assert frozen is not None
    h = torch.randn(2, 6, 6, 6)
    assert_close(frozen.eval()(h), unit.eval()(h))


@pytest.mark.parametrize("first", [nn.ReLU(inplace=True), nn.Dropout(0.5, inplace=True)])
def test_a_copy_that_writes_into_its_input_leaves_the_block_its_output(first: nn.Module) -> None:
    torch.manual_seed(0)
    blocks = [nn.Conv2d(3, 6, 3), nn.Sequential(first, nn.Conv2d(6, 8, 3), Classifier())]
    x, y = torch.randn(6, 3, 8, 8), torch.arange(6) % CLASSES
    for lookahead in (bll.Lookahead(refresh=1), bll.Lookahead(refresh=1, trainable=True)):
        loss = bll.Predictive(lookahead)
        learner = bll.BlockLocal(copy.deepcopy(blocks), classes=CLASSES, example=x[:2], loss=loss)
        assert torch.equal(learner.local(0, x, y)[1], learner.blocks[0](x))
        assert learner.backward(x, y).isfinite().all()
