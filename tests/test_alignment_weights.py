"""Feedback alignment and sign symmetry against hand-written backward passes, backpropagation and biotorch."""

import math

import numpy as np
import pytest
import torch
from alignment_cases import Residual, batch, gradients
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

from blocklocal.alignment import FeedbackAlignment, SignSymmetry

DOUBLE = torch.float64


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def backpropagate(layer: nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """A random error at the layer's output, and the gradients that it gives."""
    x = x.clone().requires_grad_()
    y = layer(x)
    delta = torch.randn_like(y)
    values = torch.autograd.grad(y, [x, *layer.parameters()], delta)
    return delta, dict(zip(["x", *dict(layer.named_parameters())], values, strict=True))


def convolve_back(delta: np.ndarray, x: np.ndarray, b: np.ndarray, stride, padding, dilation, groups) -> tuple:
    """The gradients of a 2d convolution, number by number: to the input over b, and of the weight."""
    to_x, to_w = np.zeros_like(x), np.zeros_like(b)
    (n, out, rows, columns), (_, inner, height, width) = delta.shape, b.shape
    for s, o, i, j, c, u, v in np.ndindex(n, out, rows, columns, inner, height, width):
        channel = o // (out // groups) * inner + c
        row = i * stride[0] - padding[0] + u * dilation[0]
        column = j * stride[1] - padding[1] + v * dilation[1]
        if 0 <= row < x.shape[2] and 0 <= column < x.shape[3]:
            to_x[s, channel, row, column] += delta[s, o, i, j] * b[o, c, u, v]
            to_w[o, c, u, v] += delta[s, o, i, j] * x[s, channel, row, column]
    return to_x, to_w


def test_linear_by_hand():
    layer, x = nn.Linear(5, 3).double(), torch.randn(2, 4, 5, dtype=DOUBLE)
    b = FeedbackAlignment(nn.Sequential(layer)).feedback["0"].numpy()
    delta, found = backpropagate(layer, x)
    errors, rows = delta.numpy().reshape(8, 3), x.numpy().reshape(8, 5)
    np.testing.assert_allclose(found["x"].numpy().reshape(8, 5), errors @ b, atol=1e-12)
    np.testing.assert_allclose(found["weight"].numpy(), errors.T @ rows, atol=1e-12)
    np.testing.assert_allclose(found["bias"].numpy(), errors.sum(0), atol=1e-12)
    assert not np.allclose(b, layer.weight.detach().numpy()), "drawn like the model from seed 0, but not the same"


pair = st.tuples(st.integers(1, 3), st.integers(1, 3))


@given(
    stride=pair,
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    kernel=pair,
    padding=st.one_of(st.tuples(st.integers(0, 2), st.integers(0, 2)), st.just("valid")),
    groups=st.sampled_from([1, 2, 4]),
    batched=st.booleans(),
)
def test_convolution_by_hand(stride, dilation, kernel, padding, groups, batched):
    layer = nn.Conv2d(4, 4, kernel, stride, padding, dilation, groups).double()
    b = FeedbackAlignment(nn.Sequential(layer)).feedback["0"].numpy()
    x = torch.randn(2, 4, 6, 5, dtype=DOUBLE) if batched else torch.randn(4, 6, 5, dtype=DOUBLE)
    delta, found = backpropagate(layer, x)
    errors, samples = delta.numpy().reshape(-1, *delta.shape[-3:]), x.numpy().reshape(-1, 4, 6, 5)
    zeros = (0, 0) if padding == "valid" else padding
    to_x, to_w = convolve_back(errors, samples, b, stride, zeros, dilation, groups)
    np.testing.assert_allclose(found["x"].numpy(), to_x.reshape(x.shape), atol=1e-6)
    np.testing.assert_allclose(found["weight"].numpy(), to_w, atol=1e-6)
    np.testing.assert_allclose(found["bias"].numpy(), errors.sum((0, 2, 3)), atol=1e-6)


@pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")  # PyTorch's, of the forward pass
@pytest.mark.parametrize("kernel", [2, 3, 4])
@pytest.mark.parametrize("dilation", [1, 3])
@pytest.mark.parametrize("convolution", [nn.Conv1d, nn.Conv2d, nn.Conv3d])
def test_same_padding_in_every_dimension(convolution, kernel, dilation):
    layer, plain = (
        convolution(4, 6, kernel, padding="same", dilation=dilation, groups=2, bias=False).double() for _ in range(2)
    )
    plain.weight.data = FeedbackAlignment(nn.Sequential(layer)).feedback["0"]
    x = torch.randn(2, 4, *(7, 6, 5)[: layer.weight.dim() - 2], dtype=DOUBLE)
    delta, found = backpropagate(layer, x)
    x.requires_grad_()
    assert_close(found["x"], torch.autograd.grad(plain(x), x, delta)[0], rtol=0, atol=1e-12)


def test_true_weights_give_backpropagation():
    model, (x, y) = Residual().double(), batch(dtype=DOUBLE)
    expected = gradients(model, x, y)
    alignment = FeedbackAlignment(model)
    assert not torch.allclose(gradients(model, x, y)["stem.weight"], expected["stem.weight"])
    weights = {name: layer.weight.detach() for name, layer in alignment.layers.items()}
    alignment.load_state_dict({**alignment.state_dict(), "feedback": weights})
    for name, gradient in gradients(model, x, y).items():
        assert_close(gradient, expected[name], rtol=0, atol=1e-14)


def test_a_layer_used_again_and_again():
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.cell(torch.tanh(self.cell(torch.tanh(self.cell(x)))))

    model, x, y = Recurrent().double(), torch.randn(6, 4, dtype=DOUBLE), torch.arange(6) % 4
    expected = gradients(model, x, y)["cell.weight"]
    alignment = FeedbackAlignment(model)
    alignment.feedback["cell"].copy_(model.cell.weight.detach())
    assert_close(gradients(model, x, y)["cell.weight"], expected, rtol=0, atol=1e-14)


def test_feedback_is_uniform_of_the_given_gain():
    model = nn.Sequential(nn.Conv2d(32, 64, 3), nn.Linear(300, 200))
    for name, feedback in FeedbackAlignment(model, gain=0.7).feedback.items():
        bound = 0.7 * math.sqrt(3 / {"0": 32 * 9, "1": 300}[name])
        cumulative = ((feedback.flatten().sort().values / bound) + 1) / 2
        assert_close(cumulative, torch.linspace(0, 1, feedback.numel()), rtol=0, atol=0.02)


@pytest.mark.parametrize("layer", ["Linear", "Conv2d"])
def test_equals_biotorch(layer):
    package = pytest.importorskip("biotorch.layers.fa", reason="biotorch is not installed: nothing to compare with")
    settings, x = {
        "Linear": ((7, 5), torch.randn(6, 7, dtype=DOUBLE)),
        "Conv2d": ((4, 6, 3, 2, 1, 2, 2), torch.randn(2, 4, 9, 8, dtype=DOUBLE)),
    }[layer]
    theirs, ours = getattr(package, layer)(*settings).double(), getattr(nn, layer)(*settings).double()
    nn.init.normal_(theirs.bias)
    ours.load_state_dict({"weight": theirs.weight, "bias": theirs.bias})
    alignment = FeedbackAlignment(nn.Sequential(ours))
    alignment.load_state_dict({**alignment.state_dict(), "feedback": {"0": theirs.weight_backward}})
    delta, found = backpropagate(ours, x)
    x.requires_grad_()
    expected = torch.autograd.grad(theirs(x), [x, theirs.weight, theirs.bias], delta)
    for name, value in zip(("x", "weight", "bias"), expected, strict=True):
        assert_close(found[name], value, rtol=0, atol=1e-12)


@pytest.mark.parametrize("magnitude", ["uniform", "fixed", "batchwise"])
def test_signs_concord(magnitude):
    model, (x, y) = Residual(channels=64), batch()
    alignment = SignSymmetry(model, magnitude=magnitude)
    seen = [dict(alignment.feedback)]
    for _ in range(2):
        alignment.backward(x, y)
        seen.append(dict(alignment.feedback))
    with torch.no_grad():
        model(x)
    assert alignment.feedback == seen[-1], "a pass without gradients draws nothing"
    for name, layer in alignment.layers.items():
        feedback, deviation = alignment.backward_weight(name), 1 / math.sqrt(3 * layer.weight[0].numel())
        assert torch.equal(feedback.sign(), layer.weight.sign())
        assert feedback.square().mean().sqrt().item() == pytest.approx(deviation, rel=0.1)
        assert (feedback.abs().std() < 1e-6 * deviation) == (magnitude == "uniform")
        for i, j in [(0, 1), (0, 2), (1, 2)]:
            assert torch.equal(seen[i][name], seen[j][name]) == (magnitude != "batchwise")


@pytest.mark.parametrize("magnitude", ["uniform", "fixed", "batchwise"])
def test_sign_symmetry_by_hand(magnitude):
    first, last = nn.Linear(5, 6).double(), nn.Linear(6, 4).double()
    model = nn.Sequential(first, nn.ReLU(), last)
    x, y = torch.randn(7, 5, dtype=DOUBLE), torch.arange(7) % 4
    alignment = SignSymmetry(model, magnitude=magnitude)
    found = gradients(model, x, y, alignment)
    pre = x @ first.weight.T + first.bias
    error = (F.softmax(last(pre.relu()), 1) - F.one_hot(y, 4)) / 7
    delta = error @ (last.weight.sign() * alignment.feedback["2"]) * (pre > 0)
    assert_close(found["0.weight"], delta.T @ x)


def test_feedback_takes_the_memory_format_of_the_weights():
    model, (x, y) = Residual(), batch()
    alignment = FeedbackAlignment(model)
    expected, contiguous = gradients(model, x, y), alignment.feedback["second"]
    alignment.remove()
    model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    feedback = FeedbackAlignment(model).feedback["second"]
    assert feedback.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(feedback, contiguous)
    for name, gradient in gradients(model, x.to(memory_format=torch.channels_last), y).items():
        assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6)
