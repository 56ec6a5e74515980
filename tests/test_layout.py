"""Which dimension holds the channels: found from the weights beside a border whatever the sizes are, or asked for."""

from collections.abc import Callable, Sequence

import pytest
import torch
import zoo
from torch import Tensor, nn
from torch.testing import assert_close

import blocklocal as bll
from blocklocal.border import Border
from blocklocal.layout import Layout
from blocklocal.messages import BorderSpec

CLASSES, BATCH = 3, 4


class Do(nn.Module):
    """A function as a layer."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, h: Tensor) -> Tensor:
        return self.function(h)


class Product(nn.Module):
    """A linear layer written as a matrix product."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs))

    def forward(self, h: Tensor) -> Tensor:
        return h @ self.weight


class Swin(nn.Module):
    """A residual unit on maps whose channels are last."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(channels), nn.Linear(channels, channels)

    def forward(self, h: Tensor) -> Tensor:
        return h + self.linear(self.norm(h))


def swap(h: Tensor) -> Tensor:
    return h.transpose(1, 2)


def mean(h: Tensor) -> Tensor:
    return h.mean(1)


def signals(length: int) -> Tensor:
    return torch.randn(BATCH, 2, length)


def convolution(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv1d(inputs, outputs, 3, padding=1), nn.BatchNorm1d(outputs), nn.ReLU())


def read_out(*layers: nn.Module, channels: int = 8) -> nn.Sequential:
    return nn.Sequential(*layers, nn.Linear(channels, CLASSES))


def pooled_signal() -> nn.Sequential:
    return read_out(nn.AdaptiveAvgPool1d(1), nn.Flatten())


def specs(learner: bll.BlockLocal) -> list[BorderSpec]:
    return [border.spec for border in learner.borders if isinstance(border, Border)]


def first(blocks: Sequence[nn.Module], x: Tensor, **options) -> BorderSpec:
    return specs(bll.BlockLocal(blocks, classes=CLASSES, example=x, **options))[0]


def exponential() -> Do:
    """A block without weights."""
    return Do(torch.exp)


def conv2d() -> nn.Conv2d:
    return nn.Conv2d(3, 8, 3, padding=1)


def channels_last() -> nn.Module:
    return nn.Sequential(conv2d(), Do(lambda h: h.permute(0, 2, 3, 1)))


def turned() -> nn.Module:
    return nn.Sequential(convolution(2, 8), Do(swap))


SIGNALS, TOKENS, MAPS = signals(8), torch.randn(BATCH, 8, 8), torch.randn(BATCH, 3, 8, 8)
IDS = torch.arange(8).expand(BATCH, 8)
CASES = {
    "convolution, then pooling": (convolution(2, 8), pooled_signal(), SIGNALS, "signal"),
    "convolution and pooling": (
        nn.Sequential(convolution(2, 8), nn.MaxPool1d(2)),
        pooled_signal(),
        SIGNALS,
        "signal",
    ),
    "read by a convolution": (exponential(), nn.Sequential(convolution(2, 8), pooled_signal()), signals(2), "signal"),
    "turned": (turned(), read_out(Do(mean)), signals(9), None),
    "turned, and read": (turned(), read_out(nn.Linear(8, 8), Do(mean)), SIGNALS, "tokens"),
    "turned by the reader": (convolution(2, 8), read_out(Do(swap), nn.Linear(8, 8), Do(mean)), SIGNALS, "signal"),
    "turned, an activation": (turned(), read_out(nn.GELU(), nn.Linear(8, 8), Do(mean)), SIGNALS, None),
    "linear": (nn.Linear(8, 8), read_out(Do(mean)), TOKENS, "tokens"),
    "matrix product": (Product(8, 8), read_out(Do(mean)), TOKENS, "tokens"),
    "read by attention": (
        exponential(),
        read_out(nn.TransformerEncoderLayer(8, 2, batch_first=True), Do(mean)),
        TOKENS,
        "tokens",
    ),
    "embedding": (nn.Embedding(8, 8), read_out(nn.ReLU(), Do(mean)), IDS, "tokens"),
    "nothing": (exponential(), read_out(Do(mean)), TOKENS, None),
    "map": (conv2d(), read_out(Do(lambda h: h.mean((2, 3)))), MAPS, "map"),
    "map, flattened": (conv2d(), read_out(nn.Flatten(), channels=512), MAPS, "map"),
    "patches": (conv2d(), read_out(nn.Flatten(2), Do(swap), nn.Linear(8, 8), Do(mean)), MAPS, "map"),
    "channels last": (channels_last(), read_out(Swin(8), Do(lambda h: h.mean((1, 2)))), MAPS, "tokens"),
    "volume": (nn.Conv3d(3, 8, 1), read_out(Do(lambda h: h.mean((2, 3, 4)))), MAPS.unsqueeze(2), "map"),
    "vector": (exponential(), read_out(), torch.randn(BATCH, 8), "vector"),
}


@pytest.mark.parametrize("case", CASES)
def test_the_layout_is_found_or_asked_for(case: str) -> None:
    *blocks, x, layout = CASES[case]
    options: dict = {"loss": bll.Predictive("linear")}
    if layout is None:
        with pytest.raises(ValueError, match=r'no layer at the border tells .* pass layout="tokens" if it is the'):
            first(blocks, x, **options)
        layout = "tokens"
        spec = first(blocks, x, layout=layout, **options)
    else:
        spec = first(blocks, x, **options)
    h = blocks[0](x)
    assert spec.layout == layout
    assert spec.shape == h.shape[1:]
    assert spec.channels == (h.shape[1] if layout in ("signal", "map") else h.shape[-1])


def test_zoo() -> None:
    expected = {zoo.residual: {"map", "vector"}, zoo.encoder: {"tokens"}, zoo.transformer: {"tokens"}}
    for make, layouts in expected.items():
        model, x = make()
        learner = bll.BlockLocal(model, blocks=5, classes=4, example=x, loss=bll.Predictive("linear"))
        assert {spec.layout for spec in specs(learner)} <= layouts


@pytest.mark.parametrize("length", [8, 20])
def test_statistics_of_a_signal_are_of_its_channels(length: int) -> None:
    learner = bll.BlockLocal([convolution(2, 8), pooled_signal()], classes=CLASSES, example=signals(8)).eval()
    x = signals(length)
    border, h = learner.borders[0], learner.exit(0, x)[1]
    assert isinstance(border, Border)
    assert_close(border.message(h).alpha, h.mean(2))
    learner.train().backward(x, torch.tensor([0, 1, 2, 0]))


@pytest.mark.parametrize("loss", [bll.BLL, bll.PRED_SIM, bll.Predictive("conv"), bll.Predictive("pooled")], ids=str)
def test_maps_with_channels_last_are_those_with_channels_first(loss) -> None:
    x, y, stem = torch.randn(BATCH, 3, 6, 6), torch.tensor([0, 1, 2, 0]), conv2d()
    turned = nn.Sequential(stem, Do(lambda h: h.permute(0, 2, 3, 1)))
    ends = read_out(nn.AdaptiveAvgPool2d(1), nn.Flatten()), read_out(Swin(8), Do(lambda h: h.mean((1, 2))))
    learners = [
        bll.BlockLocal(blocks, classes=CLASSES, example=x, loss=loss)
        for blocks in zip((stem, turned), ends, strict=True)
    ]
    assert [specs(learner)[0].layout for learner in learners] == ["map", "tokens"]
    learners[1].borders.load_state_dict(learners[0].borders.state_dict())
    losses, gradients = [], []
    for learner in learners:
        stem.zero_grad(set_to_none=True)
        losses.append(learner.backward(x, y)[0])
        assert stem.weight.grad is not None
        gradients.append(stem.weight.grad)
    assert_close(*losses)
    assert_close(*gradients)


def test_predictions_per_position_of_a_signal() -> None:
    dense = nn.Sequential(nn.Conv1d(8, CLASSES, 1), Do(swap))
    learner = bll.BlockLocal([convolution(2, 8), dense], classes=CLASSES, example=signals(8))
    x = signals(11)
    assert [exit.shape for exit in learner.exits(x)] == [(BATCH, 11, CLASSES)] * 2
    learner.backward(x, torch.randint(CLASSES, (BATCH, 11)))


def test_layouts_are_given() -> None:
    x = torch.randn(BATCH, 8, 8)
    blocks = [Do(torch.exp), Do(torch.sin), read_out(Do(mean))]
    options: dict = {"loss": bll.Predictive("linear")}
    one_and_each: list[Layout | list[Layout]] = ["signal", ["signal", "tokens"]]
    given = [
        [spec.layout for spec in specs(bll.BlockLocal(blocks, classes=3, example=x, layout=layout, **options))]
        for layout in one_and_each
    ]
    assert given == [["signal", "signal"], ["signal", "tokens"]]
    chain = nn.Sequential(*blocks, nn.Linear(3, 3), nn.Linear(3, 3))
    learner = bll.BlockLocal(chain, blocks=2, classes=3, example=x, layout="tokens", **options)
    assert specs(learner)[0].layout == "vector"  # two dimensions leave no choice


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layout": "maps"}, "layout='maps' is unknown: choose vector, tokens, signal, map"),
        (
            {"layout": "map"},
            r"returns a tensor of shape \(4, 8, 8\), which does not fit layout='map': pass another layout=",
        ),
        ({"layout": "vector"}, "which does not fit layout='vector'"),
        ({"layout": ["signal", "signal"]}, "layout= has 2 entries for 1 borders"),
        ({"layout": ["signal"], "blocks": 2}, "with blocks=K pass one for all"),
    ],
)
def test_layouts_that_cannot_be(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bll.BlockLocal([convolution(2, 8), pooled_signal()], classes=CLASSES, example=signals(8), **options)


@pytest.mark.parametrize("length", [BATCH, BATCH + 1])
def test_a_batch_that_is_not_first_is_refused(length: int) -> None:
    blocks = [nn.Linear(6, 8), Do(lambda h: h.transpose(0, 1)), read_out(nn.Linear(8, 8), Do(lambda h: h.mean(0)))]
    with pytest.raises(
        ValueError, match=r"block 1 returns .*: the first dimension of features must be the batch; cut else"
    ):
        bll.BlockLocal(blocks, classes=CLASSES, example=torch.randn(BATCH, length, 6))


def test_on_the_meta_device() -> None:
    blocks = [convolution(2, 8), read_out(Do(swap), nn.Linear(8, 8), Do(mean))]
    for block in blocks:
        block.to("meta")
    assert first(blocks, signals(8).to("meta")).layout == "signal"


def test_layers_with_parametrized_weights() -> None:
    weight_norm, spectral_norm = nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.spectral_norm
    blocks = [weight_norm(nn.Conv1d(2, 8, 3)), spectral_norm(nn.Conv1d(8, 8, 3)), pooled_signal()]
    learner = bll.BlockLocal(nn.Sequential(*blocks), at=["0", "1"], classes=CLASSES, example=signals(8))
    assert [spec.layout for spec in specs(learner)] == ["signal", "signal"]
    learner.backward(signals(8), torch.tensor([0, 1, 2, 0]))
    assert all(p.grad is not None for p in learner.model.parameters())
    assert torch.equal(learner.eval().predict(SIGNALS), learner.model(SIGNALS))
