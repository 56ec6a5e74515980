"""Direct feedback alignment and target projection against backward passes written by hand."""

import pytest
import torch
from alignment_cases import RULES, Residual, batch, gradients
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

from blocklocal.alignment import DirectFeedbackAlignment, DirectRandomTargetProjection

both = pytest.mark.parametrize("rule", ["dfa", "drtp"])


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@both
def test_chain_by_hand(rule):
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 7), nn.ReLU(), nn.Linear(7, 4)).double()
    x, y = torch.randn(8, 5, dtype=torch.float64), torch.arange(8) % 4
    alignment = RULES[rule](model, x[:2], 0)
    found = gradients(model, x, y, alignment)
    with torch.no_grad():
        h1 = torch.tanh(model[0](x))
        h2 = F.relu(model[2](h1))
        labels = F.one_hot(y, 4).double()
        error = (F.softmax(model[4](h2), 1) - labels) / 8
        sent = error if rule == "dfa" else labels / 8
        delta2 = sent @ alignment.feedback["4"] * (h2 > 0)
        delta1 = sent @ alignment.feedback["2"] * (1 - h1**2)
    for name, delta, h in [("4", error, h2), ("2", delta2, h1), ("0", delta1, x)]:
        assert_close(found[f"{name}.weight"], delta.T @ h, rtol=0, atol=1e-12)
        assert_close(found[f"{name}.bias"], delta.sum(0), rtol=0, atol=1e-12)


@both
def test_branches_by_hand(rule):
    """The network in pieces, cut at the inputs of layers; what is sent to a cut is its gradient in one sum over all."""
    model, (x, y) = Residual().double(), batch(dtype=torch.float64)
    alignment = RULES[rule](model, x[:2], 0)
    found = gradients(model, x, y, alignment)
    alignment.remove()
    stem = F.relu(model.stem(x))
    inner = F.relu(model.norm(model.first(stem.detach())))
    pooled = F.relu(model.shortcut(stem.detach()) + model.second(inner.detach())).mean((2, 3))
    prediction = model.classifier(pooled.detach())
    labels = F.one_hot(y, 4).double()
    sent = (F.softmax(prediction.detach(), 1) - labels if rule == "dfa" else labels) / len(y)
    total = F.cross_entropy(prediction, y)
    for name, cut in [("first", stem), ("shortcut", stem), ("second", inner), ("classifier", pooled)]:
        total = total + (cut * torch.einsum("bn,n...->b...", sent, alignment.feedback[name])).sum()
    model.zero_grad()
    total.backward()
    for name, p in model.named_parameters():
        assert_close(found[name], p.grad, rtol=0, atol=1e-12)


def test_dense_targets():
    model, (x, y) = Residual(), batch()
    alignment = DirectRandomTargetProjection(model, example=x)
    labels = gradients(model, x, y, alignment)
    dense = gradients(model, x, F.one_hot(y, 4).float(), alignment)
    assert_close(dense["stem.weight"], labels["stem.weight"])


class Two(nn.Module):
    def __init__(self, call) -> None:
        super().__init__()
        self.a, self.b, self.call = nn.Linear(4, 4), nn.Linear(4, 4), call

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self, x)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, x: m.b(m.a(m.a(x))), "a is used twice"),
        (lambda m, x: m.a(x), "does not use b for the example"),
        (lambda m, x: m.b(m.a(x)).sum(), r"output is \(\): DirectFeedbackAlignment needs a tensor \(batch, n\)"),
        (lambda m, x: (m.b(m.a(x)),), "output is a tuple"),
        (lambda m, x: m.b(m.a(x)[:1]), "b gets a batch of 1 from one of 2"),
    ],
    ids=["twice", "unused", "scalar", "tuple", "batch"],
)
def test_models_that_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        DirectFeedbackAlignment(Two(call), example=torch.randn(2, 4))


def test_uses_that_are_refused():
    model, (x, y) = Residual(), batch()
    alignment = DirectFeedbackAlignment(model, example=x)
    expected = gradients(model, x, y, alignment)
    with pytest.raises(ValueError, match=r"shortcut got \(8, 4, 4\) per sample and \(8, 6, 6\) in the example"):
        alignment.backward(x[..., 1:-1, 1:-1], y)
    found = gradients(model, x, y, alignment)
    assert all(torch.equal(found[name], value) for name, value in expected.items()), "a failed pass left traces"
    with pytest.raises(ValueError, match="first ran outside a call of the model"):
        model.first(model.stem(x))
    alignment.remove()
    DirectRandomTargetProjection(model, example=x)
    with pytest.raises(ValueError, match="needs the targets"):
        model(x)
