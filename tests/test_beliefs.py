"""Beliefs that add along the chain: every exit corrects the exits before it."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

import blocklocal as bll

CLASSES = 4


def chain(**options) -> tuple[bll.BlockLocal, Tensor, Tensor]:
    torch.manual_seed(0)
    blocks = [
        nn.Sequential(nn.Linear(6, 16), nn.Tanh()),
        nn.Sequential(nn.Linear(16, 8), nn.Tanh()),
        nn.Linear(8, CLASSES),
    ]
    x, y = torch.randn(40, 6), torch.arange(40) % CLASSES
    settings = {"classes": CLASSES, "example": x[:2], "loss": bll.Predictive("linear"), "add_beliefs": True} | options
    return bll.BlockLocal(blocks, **settings), x, y


def test_losses_and_gradients_are_those_of_sums_whose_earlier_parts_are_constants() -> None:
    learner, x, y = chain()
    losses = learner.backward(x, y)
    found = [parameter.grad for parameter in learner.parameters()]
    learner.zero_grad()
    h, belief, expected = x, torch.zeros(40, CLASSES), []
    for k, block in enumerate(learner.blocks):
        h = block(h)
        belief = belief + (learner.borders[k].get_submodule("terms.0.head.linear")(h) if k < 2 else h)
        loss = F.cross_entropy(belief, y)
        loss.backward()
        expected.append(loss.detach())
        h, belief = h.detach(), belief.detach()
    assert_close(losses, torch.stack(expected))
    for ours, parameter in zip(found, learner.parameters(), strict=True):
        assert_close(ours, parameter.grad)
    together = torch.stack(learner(x, y))
    assert_close(together.detach(), losses)


def test_predictions_are_sums_of_logits() -> None:
    learner, x, _ = chain()
    plain, _, _ = chain(add_beliefs=False)
    plain.load_state_dict(learner.state_dict())
    own = torch.stack(plain.exits(x))
    for k, exit in enumerate(learner.exits(x)):
        assert_close(exit, own[: k + 1].sum(0))
        assert_close(learner.predict(x, exit=k), exit)
        assert_close(learner.predictor(exit=k)(x), exit)
    assert_close(learner.predict(x), own.sum(0))
    assert_close(learner.predictor()(x), own.sum(0))
    assert not torch.allclose(learner.predict(x), learner.model(x))
    everything = own.cumsum(0).log_softmax(-1).mean(0)
    assert_close(learner.predict(x, exit="all"), everything)
    exported = torch.export.export(learner.predictor(exit="all").eval(), (x,)).module()
    assert_close(exported(x), everything)


def test_a_sure_sample_leaves_with_its_belief() -> None:
    learner, x, _ = chain()
    exits = torch.stack(learner.exits(x))
    sure = exits.softmax(-1).amax(-1) >= 0.35
    sure[-1] = True
    assert 0 < sure[0].sum() < len(x)
    expected = exits.gather(0, sure.int().argmax(0)[None, :, None].expand(1, -1, CLASSES))[0]
    assert_close(learner.predict(x, confidence=0.35), expected)


def test_diagnosis_is_that_of_the_sum() -> None:
    learner, x, y = chain()
    before = copy.deepcopy(learner.state_dict())
    reports = learner.diagnose(x, y)
    assert [report["predictive"] for report in reports] == pytest.approx(
        [loss.item() for loss in learner.eval()(x, y)[:2]]
    )
    assert all(torch.equal(value, before[name]) for name, value in learner.state_dict().items())


def test_beliefs_are_single_at_least() -> None:
    learner, x, y = chain()
    with torch.autocast("cpu", torch.bfloat16):
        _, message = learner.local(0, x, y)
        _, (h, belief) = learner.local(1, message, y)
    assert (h.dtype, belief.dtype) == (torch.bfloat16, torch.float32)
    assert not belief.requires_grad


def test_tokens_have_beliefs_of_their_own() -> None:
    blocks = [nn.Linear(6, 8), nn.Linear(8, CLASSES)]
    learner = bll.BlockLocal(
        blocks, classes=CLASSES, example=torch.randn(2, 5, 6), loss=bll.Predictive("linear"), add_beliefs=True
    )
    assert [exit.shape for exit in learner.exits(torch.randn(3, 5, 6))] == [(3, 5, CLASSES)] * 2


def test_what_is_no_chain_of_beliefs_is_refused() -> None:
    with pytest.raises(ValueError, match="this border predicts nothing"):
        chain(loss=bll.Variational())
    with pytest.raises(TypeError, match="add_beliefs is 1"):
        chain(add_beliefs=1)
    learner, x, y = chain()
    _, message = learner.local(0, x, y)
    with pytest.raises(TypeError, match="block 1 reads a pair, features and belief, as block 0"):
        learner.local(1, message[0], y)
    with pytest.raises(TypeError, match="h is a tuple"):
        learner.local(0, message, y)
