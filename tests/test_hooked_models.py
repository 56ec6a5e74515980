"""Models of many kinds in blocks inside their own forward pass: ours, hand-written ones, timm, transformers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
import zoo
from torch import Tensor, nn
from torch.nn import functional as F

from blocklocal import Hooked
from blocklocal.hooked.places import places
from blocklocal.hooked.values import call, prediction_of
from blocklocal.lab.models import MODELS, build


@dataclass
class Output:
    """As libraries return: an object with the prediction in it."""

    logits: Tensor


class Masked(nn.Module):
    """Two inputs, of which the mask passes every border."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.layers = nn.ModuleList(zoo.Layer(8) for _ in range(3))
        self.head = nn.Linear(8, 4)

    def forward(self, tokens: Tensor, mask: Tensor) -> dict[str, Tensor | None]:
        h = self.embedding(tokens)
        for layer in self.layers:
            h = layer(h) * mask[..., None]
        return {"loss": None, "logits": self.head(h.sum(1) / mask.sum(1, keepdim=True)), "hidden": h}


class Scored(nn.Module):
    """A unit that returns its features with something beside them."""

    def __init__(self, *, named: bool) -> None:
        super().__init__()
        self.linear, self.named = nn.Linear(8, 8), named

    def forward(self, h: Tensor) -> object:
        h = self.linear(h).relu()
        scores = h.detach().softmax(-1)
        return {"index": scores.argmax(-1), "features": h} if self.named else (h, scores)


class Tuples(nn.Module):
    def __init__(self, *, named: bool) -> None:
        super().__init__()
        self.key = "features" if named else 0
        self.units = nn.ModuleList(Scored(named=named) for _ in range(4))
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Output:
        for unit in self.units:
            x = unit(x)[self.key]
        return Output(self.head(x))


class Recurrent(nn.Module):
    """LSTMs return (output, state)."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.layers = nn.ModuleList(nn.LSTM(8, 8, batch_first=True) for _ in range(3))
        self.head = nn.Linear(8, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.embedding(tokens)
        for layer in self.layers:
            h, _ = layer(h)
        return self.head(h)


class Windows(nn.Module):
    """Channels last, (B, H, W, C), as in Swin; the pooled prediction beside one per position."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 2, 2)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)) for _ in range(4)
        )
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.patches(x).permute(0, 2, 3, 1)
        for layer in self.layers:
            h = layer(h)
        return self.head(h.mean((1, 2))), h


class Language(nn.Module):
    """The head's weight is the embedding's, if tied; a unit may be called twice."""

    def __init__(self, *, tied: bool = False, twice: bool = False) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(11, 8), nn.Linear(8, 11, bias=False)
        if tied:
            self.head.weight = self.embedding.weight
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(3))
        self.order = [0, 1, 1] if twice else [0, 1, 2]

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.embedding(tokens)
        for i in self.order:
            h = self.layers[i](h)
        return self.head(h)


class Pooled(nn.Module):
    """An encoder that returns its features with what it has pooled of them, which is what the head reads, as BERT."""

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.positions = nn.Embedding(11, 8), nn.Embedding(5, 8)
            self.layers = nn.ModuleList(zoo.Layer(8) for _ in range(2))
            self.pooler = nn.Linear(8, 8)

        def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
            h = self.positions(torch.arange(5).expand(len(tokens), -1)) + self.words(tokens)
            for layer in self.layers:
                h = layer(h)
            return h, self.pooler(h[:, 0]).tanh()

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.head = self.Encoder(), nn.Linear(8, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.encoder(tokens)[1])


class Scaled(nn.Module):
    """A residual unit whose skip goes through an identity, as in PoolFormer: that returns what the unit reads too."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.linear = nn.Identity(), nn.Linear(8, 8)

    def forward(self, h: Tensor) -> Tensor:
        return self.scale(h) + self.linear(h).tanh()


class Skipping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.inner, self.head = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        return self.head(h + self.inner(h).relu())


class Turned(nn.Module):
    """Time first inside."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, h: Tensor) -> Tensor:
        return self.linear(h.transpose(0, 1)).transpose(0, 1)


class Caching(nn.Module):
    """In evaluation mode it keeps what it has made of its weight until the mode changes, as LeViT."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.cache = nn.Parameter(torch.ones(8)), None

    def train(self, mode: bool = True) -> Caching:
        self.cache = None
        return super().train(mode)

    def forward(self, h: Tensor) -> Tensor:
        if self.training:
            return h * self.weight.exp()
        self.cache = self.weight.exp() if self.cache is None else self.cache
        return h * self.cache


def ours(name: str):
    torch.manual_seed(0)
    return build(name, channels=3, size=(16, 16), classes=4), torch.randn(3, 3, 16, 16)


def masked():
    mask = torch.ones(3, 5)
    mask[0, 3:] = 0
    return Masked(), (torch.randint(11, (3, 5)), mask)


def named():
    model, (tokens, mask) = masked()
    return model, {"mask": mask, "tokens": tokens}


def check(model: nn.Module, x, *, classes: int = 4, **where) -> Hooked:
    """The model's output is the same with borders, every parameter learns, and each from its own block's loss; the
    predictor of the first exit predicts the same with the parameters that learn from the first loss."""
    parameters = dict(model.named_parameters())
    model.eval()
    before = prediction_of(call(model, x)).detach()  # with gradients recorded, without which an LSTM computes otherwise
    learner = Hooked(model, classes=classes, example=x, **where)
    y = torch.randint(classes, before.shape[:-1])

    seen: list[Tensor] = []
    handle = model.register_forward_hook(lambda module, arguments, output: seen.append(prediction_of(output)))
    learner.eval()
    losses = learner(x, y)
    handle.remove()
    assert torch.equal(seen[0], before)
    assert torch.equal(losses[-1], F.cross_entropy(before.flatten(0, -2), y.flatten()))

    learner.train()
    learnt: set[str] = set()
    for k, loss in enumerate(learner(x, y)):
        loss.backward()
        reached = {name for name, parameter in parameters.items() if parameter.grad is not None}
        own = {id(parameter) for parameter in learner.block_parameters(k)}
        assert {id(parameters[name]) for name in reached} <= own
        assert not reached & learnt
        learnt |= reached
        learner.zero_grad(set_to_none=True)
        kept = {name for name, _ in learner.predictor(exit=k).model.named_parameters()}
        assert learnt <= kept  # and what is read, but not used
    assert learnt == {*parameters}
    with torch.no_grad():
        early: Any = call(learner.eval().predictor(exit=0), x)
        assert torch.equal(early, learner.predict(x, exit=0))
    return learner


# Of the residual networks the smallest; others are in benchmarks/models.py.
@pytest.mark.parametrize("name", [name for name in MODELS if not name.startswith("resnet") or name == "resnet8"])
def test_our_own_models(name):
    model, x = ours(name)
    assert len(check(model, x, blocks=4).cuts) == 3


@pytest.mark.parametrize(
    "make",
    [
        masked,
        named,
        lambda: (Tuples(named=False), torch.randn(3, 8)),
        lambda: (Tuples(named=True), torch.randn(3, 8)),
        lambda: (Recurrent(), torch.randint(11, (3, 5))),
        lambda: (Windows(), torch.randn(3, 3, 8, 8)),
    ],
    ids=["masked", "named", "tuples", "dicts", "recurrent", "windows"],
)
def test_models_that_are_written_in_other_ways(make):
    torch.manual_seed(0)
    model, x = make()
    assert len(check(model, x, blocks=3).cuts) == 2


def test_no_border_stands_where_another_value_goes_on_or_where_samples_do_not_differ():
    x = torch.randint(11, (5, 5))
    found = places(Pooled(), x, output=prediction_of)
    assert "encoder" not in found
    assert "encoder.positions" not in found
    assert {"encoder.words", "encoder.layers.0", "encoder.layers.1"} <= {*found}
    check(Pooled(), x, blocks=4)
    with pytest.raises(ValueError, match=r"at='encoder': a value, .*'encoder.words.weight', passes the border"):
        Hooked(Pooled(), at=["encoder"], classes=4, example=x)


def test_no_border_stands_at_an_identity_beside_which_its_input_goes_on():
    model, x = nn.Sequential(nn.Linear(6, 8), Scaled(), Scaled(), nn.Linear(8, 4)), torch.randn(3, 6)
    assert places(model, x, output=prediction_of) == ["0", "1", "2"]
    check(model, x, blocks=4)
    chain = nn.Sequential(nn.Linear(6, 8), nn.Identity(), nn.Linear(8, 4))
    assert places(chain, x, output=prediction_of) == ["0"]


def test_what_a_model_caches_in_evaluation_mode_does_not_outlast_the_example():
    model = nn.Sequential(nn.Linear(6, 8), Caching(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4))
    model[0].eval()
    Hooked(model, blocks=3, classes=4, example=torch.randn(3, 6))
    assert model[1].cache is None
    assert [module.training for module in model] == [False, True, True, True, True]


def test_features_without_a_batch_are_refused_by_name():
    model = zoo.Transformer(pooled=True)
    model.layers.insert(0, Turned())
    with pytest.raises(ValueError, match=r"at='layers.0.linear': .*\(5, 3, 8\).*must be the batch"):
        Hooked(model, at=["layers.0.linear"], classes=4, example=torch.randint(11, (3, 5)))


def test_tied_weights_are_refused_by_name():
    x = torch.randint(11, (3, 5))
    with pytest.raises(ValueError, match=r"parameter 'embedding.weight' is read by block 0 and by block 2"):
        Hooked(Language(tied=True), at=["layers.0", "layers.1"], classes=11, example=x)
    assert Hooked(Language(tied=True), at=["layers.0"], classes=11, example=x, tied=True).cuts == ["layers.0"]
    check(Language(), x, classes=11, blocks=3)


def test_a_residual_around_a_border_is_refused_by_name():
    x = torch.randn(3, 6)
    with pytest.raises(ValueError, match=r"at='inner'.*'stem.weight'.*passes the border beside the features"):
        Hooked(Skipping(), at=["inner"], classes=4, example=x)
    check(Skipping(), x, at=["stem"])


def test_a_submodule_that_is_not_called_once_is_refused():
    x = torch.randint(11, (3, 5))
    with pytest.raises(ValueError, match=r"at='layers.1': .* called 2 times"):
        Hooked(Language(twice=True), at=["layers.1"], classes=11, example=x)
    with pytest.raises(ValueError, match=r"at='layers.2': .* called 0 times"):
        Hooked(Language(twice=True), at=["layers.2"], classes=11, example=x)


def test_a_model_of_timm():
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = timm.create_model(
        "swin_tiny_patch4_window7_224", num_classes=4, img_size=32, window_size=2, embed_dim=24, depths=(2, 2, 2, 2)
    )
    check(model, torch.randn(3, 3, 32, 32), blocks=4)


def test_a_model_of_transformers():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    configuration = transformers.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=32, num_labels=4
    )
    mask = torch.ones(3, 6, dtype=torch.int64)
    mask[0, 4:] = 0
    x = {"input_ids": torch.randint(1, 50, (3, 6)), "attention_mask": mask}
    check(transformers.BertForSequenceClassification(configuration), x, blocks=4)
