"""Borders inside a model's own forward pass: as the chain, and on models that no chain is made of."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import blocklocal as bll
from blocklocal.memory import MemoryTracker

CLASSES = 5


class Unit(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels)

    def forward(self, h: Tensor) -> Tensor:
        return torch.relu_(h + self.norm(self.conv(h)))


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), Unit(8), Unit(8), Unit(8), nn.AvgPool2d(4), nn.Flatten(), nn.Linear(32, CLASSES)
    )


def batch() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(6, 3, 8, 8), torch.tensor([0, 1, 2, 3, 4, 0])


def both(**settings) -> tuple[bll.BlockLocal, bll.Hooked]:
    """The chain and the hooks on equal models, with equal borders."""
    x, _ = batch()
    torch.manual_seed(2)
    chain = bll.BlockLocal(network(), at=["1", "3"], classes=CLASSES, example=x, **settings)
    torch.manual_seed(2)
    return chain, bll.Hooked(network(), at=["1", "3"], classes=CLASSES, example=x, **settings)


def equal(one: nn.Module, other: nn.Module, *, gradients: bool = False) -> bool:
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return all(torch.equal(gradient_of(p), gradient_of(q)) if gradients else torch.equal(p, q) for p, q in pairs)


def gradient_of(parameter: nn.Parameter) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


@pytest.mark.parametrize(
    "settings", [{}, {"add_beliefs": True}, {"loss": bll.PRED_SIM}, {"statistic": bll.spatial_max}]
)
def test_as_the_chain_to_the_bit(settings: dict) -> None:
    """Losses, weights after steps, peak of bytes, every exit, diagnostics, weights of exits."""
    chain, hooked = both(**settings)
    x, y = batch()
    peaks = []
    for learner in (chain, hooked):
        steps = [torch.optim.SGD(learner.block_parameters(k), lr=0.1, momentum=0.9) for k in range(3)]
        with MemoryTracker() as tracker:
            learner.backward(x, y, optimizers=steps)
        peaks.append(tracker.timeline.peak)
        for _ in range(2):
            learner.backward(x, y, optimizers=steps)
    assert equal(chain.model, hooked.model)
    assert equal(chain.borders, hooked.borders)
    assert peaks[1] <= 1.1 * peaks[0]  # frames of the forward pass hold what a chain lets go
    for learner in (chain, hooked):
        learner.fit_exits([(x, y)])
        learner.eval()
    assert chain.pool.weights == hooked.pool.weights
    for exit in (0, 1, 2, None, "all"):
        assert torch.equal(chain.predict(x, exit=exit), hooked.predict(x, exit=exit))
    first, second = (learner.predict(x, confidence=0.25) for learner in (chain, hooked))
    torch.testing.assert_close(first, second)  # the chain goes on with fewer samples, which rounds otherwise
    assert chain.diagnose(x, y) == hooked.diagnose(x, y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_add_up_and_graphs_may_stay(dtype: torch.dtype) -> None:
    """Accumulated gradients, those of the sum of losses, under autocast too."""
    chain, hooked = both()
    x, y = batch()
    for learner in (chain, hooked):
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            learner.backward(x, y, scale=0.5)
            learner.backward(x.flip(0), y.flip(0), scale=0.5)
            torch.stack(learner(x, y)).sum().backward()
    assert equal(chain, hooked, gradients=True)


def test_blocks_are_isolated() -> None:
    """The gradient of local loss k reaches the parameters of block k and of its border, and those alone."""
    _, hooked = both()
    x, y = batch()
    for k, loss in enumerate(hooked(x, y)):
        hooked.zero_grad()
        loss.backward()
        reached = {id(p) for p in hooked.parameters() if p.grad is not None}
        assert reached == {id(p) for p in hooked.block_parameters(k)}


class Masked(nn.Module):
    """Two inputs, features in a tuple, a value without gradient passed on from block to block, a dict as output."""

    def __init__(self, *, tied: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(CLASSES, 16)
        self.layers = nn.ModuleList(MaskedLayer(16) for _ in range(4))
        self.head = nn.Linear(16, CLASSES, bias=False)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor, *, mask: Tensor) -> dict[str, Tensor]:
        h, scale = self.embedding(ids), mask.unsqueeze(-1).float()
        for layer in self.layers:
            h, scale = layer(h, scale)
        return {"logits": self.head(h)}


class MaskedLayer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(width), nn.Linear(width, width)

    def forward(self, h: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        return h + scale * torch.relu(self.linear(self.norm(h))), scale


def tokens() -> tuple[dict[str, Tensor], Tensor]:
    torch.manual_seed(3)
    ids = torch.randint(CLASSES, (4, 7))
    mask = torch.arange(6) < torch.tensor([[6], [4], [5], [6]])
    return {"ids": ids[:, :-1], "mask": mask}, ids[:, 1:].contiguous()


def test_any_inputs_and_outputs() -> None:
    """A model that no chain can be made of is cut by itself, and its blocks learn."""
    x, y = tokens()
    learner = bll.Hooked(Masked(), blocks=4, classes=CLASSES, example=x)
    assert learner.cuts == ["layers.0", "layers.1", "layers.2"]
    assert [border.spec.layout for border in learner.borders] == ["tokens"] * 3
    optimizer = torch.optim.AdamW(learner.parameters(), lr=0.01)
    losses = []
    for _ in range(30):
        losses.append(learner.backward(x, y))
        optimizer.step()
        optimizer.zero_grad()
    assert (losses[-1] < losses[0] - 0.3).all()
    assert torch.equal(learner.predict(x), learner.model(**x)["logits"])


def test_what_is_refused_by_name() -> None:
    x, _ = tokens()

    def refused(match: str, model: nn.Module | None = None, **settings) -> None:
        with pytest.raises(ValueError, match=match):
            bll.Hooked(model or Masked(), **{"at": ["layers.1"], "classes": CLASSES, "example": x, **settings})

    refused("'embedding.weight' is read by block 0 and by block 1: untie it", Masked(tied=True))
    refused("can be cut at 0 places only.*tied=True", Masked(tied=True), at=None, blocks=2)
    refused("'embedding.weight', passes the border beside", at=["layers.1.norm"])
    refused("no such submodule; it has 'embedding', 'layers', 'layers.0'", at=["layer"])
    refused("is there twice", at=["layers.1", "layers.1"])
    refused("no computation with parameters follows", at=["head"])
    refused("called 0 times", at=["layers"])
    refused("can be cut at 5 places only: embedding, layers.0", at=None, blocks=7)
    refused("its last dimension must be 6", classes=6)
    twice = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3))
    twice[1] = twice[0]
    refused("called 2 times", twice, at=["0"], example=torch.randn(2, 4), classes=3)
    with pytest.raises(ValueError, match=r"Lookahead.* only BlockLocal has"):
        bll.Hooked(Masked(), at=["layers.1"], classes=CLASSES, example=x, loss=bll.Predictive(bll.Lookahead()))


def test_tied_parameters_on_request() -> None:
    """Both losses move them: their gradient is the sum of what each block's loss gives alone."""
    x, y = tokens()
    learner = bll.Hooked(Masked(tied=True), blocks=3, classes=CLASSES, example=x, tied=True)
    weight = learner.model.get_parameter("embedding.weight")
    losses = learner.eval()(x, y)
    parts = [torch.autograd.grad(loss, weight, retain_graph=True)[0] for loss in (losses[0], losses[-1])]
    learner.backward(x, y)
    assert torch.allclose(gradient_of(weight), parts[0] + parts[1])
    optimizers = [torch.optim.SGD(learner.block_parameters(k), lr=0.1) for k in range(3)]
    with pytest.raises(ValueError, match=r"optimizers= would step 'embedding.weight'"):
        learner.backward(x, y, optimizers=optimizers)


def test_a_pass_that_is_not_the_example_s() -> None:
    """A submodule that one batch leaves out, or that checkpointing runs again, stops the step."""

    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(self.b(self.a(x)) if x.mean() > 0 else self.b(x))

    x, y = torch.ones(2, 4), torch.tensor([0, 1])
    learner = bll.Hooked(Branch(), at=["a"], classes=3, example=x)
    with pytest.raises(ValueError, match="did not call 'a'"):
        learner.backward(-x, y)
    assert torch.equal(learner.predict(-x), learner.model(-x))  # and nothing stays behind

    class Checkpointed(Branch):
        def forward(self, x: Tensor) -> Tensor:
            return self.c(checkpoint(lambda h: self.b(self.a(h)), x, use_reentrant=False))

    learner = bll.Hooked(Checkpointed(), at=["a"], classes=3, example=x)
    with pytest.raises(ValueError, match=r"'a' is called twice.*checkpointing"):
        learner.backward(x, y)


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (torch.zeros(0, 3, 8, 8), torch.zeros(0, dtype=torch.int64), "empty batch"),
        (batch()[0], batch()[1][:3], "one target per sample"),
        (batch()[0], batch()[1].float(), "pass y.long"),
        (batch()[0], batch()[1] + 1, "labels run from 1 to 5"),
        (batch()[0], batch()[1][:, None], "targets of 1 dimension"),
        ("images", batch()[1], "x is 'images'"),
    ],
)
def test_wrong_batches(x, y, message: str) -> None:
    _, hooked = both()
    steps = [torch.optim.SGD(hooked.block_parameters(k), lr=0.1) for k in range(3)]
    before = copy.deepcopy(hooked.state_dict())
    with pytest.raises((ValueError, TypeError), match=message):
        hooked.backward(x, y, optimizers=steps)
    for name, value in hooked.state_dict().items():
        assert torch.equal(value, before[name]) or "running" in name or "tracked" in name


def test_an_exit_ends_the_pass() -> None:
    _, hooked = both()
    x, _ = batch()
    called = []
    hooked.model.get_submodule("6").register_forward_hook(lambda *_: called.append(1))
    hooked.eval().predict(x, exit=0)
    assert not called
    hooked.predict(x)
    assert called


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # PyTorch warns of itself
def test_the_model_stays_its_own() -> None:
    """It is copied, saved and compiled layer by layer; `remove` leaves no hook on it."""
    chain, hooked = both()
    x, y = batch()
    twin = copy.deepcopy(hooked)
    for layer in (twin.model.get_submodule("1"), twin.model.get_submodule("2")):
        layer.compile(backend="aot_eager")
    for learner in (chain, hooked, twin):
        learner.backward(x, y)
    assert equal(chain.model, hooked.model, gradients=True)
    for ours, theirs in zip(hooked.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)
    file = io.BytesIO()
    torch.save(hooked.model, file)
    file.seek(0)
    assert equal(torch.load(file, weights_only=False), hooked.model)
    hooked.remove()
    assert not any(module._forward_hooks for module in hooked.model.modules())
    with pytest.raises(ValueError, match="removed"):
        hooked.backward(x, y)


def test_parameters_that_the_example_does_not_reach() -> None:
    """Frozen ones and experts without a token stand with their neighbours."""

    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
            self.norm, self.last = nn.LayerNorm(4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.norm(self.first["a" if x.mean() > 0 else "b"](x)))

    model = Experts()
    model.last.bias.requires_grad_(False)
    learner = bll.Hooked(model, at=["norm"], classes=3, example=torch.ones(2, 4))
    own = {id(p) for p in learner.block_parameters(0)}
    assert {id(p) for p in model.first.parameters()} <= own
    assert id(model.last.bias) in {id(p) for p in learner.block_parameters(1)}


@pytest.mark.parametrize("loss", [bll.BLL, bll.Variational(estimate_variance=True) + bll.Posterior(softness=0.1)])
@pytest.mark.parametrize("feedback", [bll.ClosedFormFeedback(), bll.GradientFeedback(depth=2, width=8)])
@pytest.mark.parametrize("ignore_index", [-100, 0])
def test_padding_counts_nowhere(loss, feedback, ignore_index: int) -> None:
    """Losses, gradients, feedback and diagnostics are those of the same tokens without the padding behind them."""
    model = nn.Sequential(nn.Embedding(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, CLASSES))
    torch.manual_seed(4)
    ids, y = torch.randint(8, (4, 9)), torch.randint(1, CLASSES, (4, 9))
    padded_ids, padded = F.pad(ids, (0, 3), value=7), F.pad(y, (0, 3), value=ignore_index)
    found = []
    for x, targets, learner_of in (
        (ids, y, bll.BlockLocal),
        (padded_ids, padded, bll.BlockLocal),
        (padded_ids, padded, bll.Hooked),
    ):
        torch.manual_seed(5)
        learner = learner_of(
            copy.deepcopy(model),
            at=["1"],
            classes=CLASSES,
            ignore_index=ignore_index,
            example=ids,
            loss=loss,
            feedback=feedback,
        )
        losses = learner.backward(x, targets)
        gradients = [parameter.grad for parameter in learner.parameters()]
        (report,) = learner.diagnose(x, targets)
        found.append((losses, gradients, list(learner.borders.buffers()), torch.tensor(list(report.values()))))
    for padded_one in found[1:]:
        torch.testing.assert_close(padded_one, found[0])
    with pytest.raises(ValueError, match="every label is ignore_index"):
        learner.backward(ids, torch.full_like(y, ignore_index))


def test_padding_that_nobody_has_named() -> None:
    model = nn.Sequential(nn.Embedding(8, 16), nn.ReLU(), nn.Linear(16, CLASSES))
    learner = bll.Hooked(model, at=["1"], classes=CLASSES, example=torch.zeros(2, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"run from -100 to 1.*pass ignore_index="):
        learner.backward(torch.zeros(1, 2, dtype=torch.int64), torch.tensor([[1, -100]]))
    with pytest.raises(ValueError, match="ignore_index= is a label"):
        bll.Targets(3, labels=False, ignore_index=0)


@pytest.mark.parametrize("learner_of", [bll.BlockLocal, bll.Hooked])
def test_an_optimizer_of_the_model_alone_is_noticed(learner_of, recwarn: pytest.WarningsRecorder) -> None:
    """It would leave the heads untrained; the right one, and gradients that add up, say nothing."""
    x, y = batch()
    model = network()
    learner = learner_of(model, at=["1"], classes=CLASSES, example=x)
    right = torch.optim.SGD(learner.parameters(), lr=0.1)
    for _ in range(2):
        learner.backward(x, y, scale=0.5)
        learner.backward(x, y, scale=0.5)
        right.step()
        right.zero_grad()
    assert not recwarn.list
    wrong = torch.optim.SGD(model.parameters(), lr=0.1)
    learner.backward(x, y)
    wrong.step()
    wrong.zero_grad()
    with pytest.warns(UserWarning, match=r"pass it learner.parameters\(\)"):
        learner.backward(x, y)


@pytest.mark.parametrize("learner_of", [bll.BlockLocal, bll.Hooked])
def test_a_block_without_an_optimizer_stands_still(learner_of) -> None:
    x, y = batch()
    learner = learner_of(network(), at=["1", "3"], classes=CLASSES, example=x)
    before = copy.deepcopy([[*learner.block_parameters(k)] for k in range(3)])
    steps = [torch.optim.SGD(learner.block_parameters(k), lr=0.1) for k in range(3)]
    losses = learner.backward(x, y, optimizers=[steps[0], None, steps[2]])
    assert losses.shape == (3,)
    for k, own in enumerate(before):
        after = learner.block_parameters(k)
        assert all(parameter.grad is None for parameter in after)
        assert all(torch.equal(p, q) for p, q in zip(own, after, strict=True)) == (k == 1)
    with pytest.raises(ValueError, match=r"optimizers\[1\] has no parameter of block 1"):
        learner.backward(x, y, optimizers=[None, steps[0], steps[2]])


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # PyTorch warns of itself
def test_compiled_layers_are_compiled_once() -> None:
    _, hooked = both()
    x, y = batch()
    compiled = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]):
        compiled.append(graph)
        return graph.forward

    hooked.model.get_submodule("1").compile(backend=backend)
    hooked.backward(x, y)
    first = len(compiled)
    for _ in range(3):
        hooked.backward(x, y)
    assert 0 < first == len(compiled)


@pytest.mark.parametrize("learner_of", [bll.BlockLocal, bll.Hooked])
def test_a_criterion_with_parameters_is_refused(learner_of) -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, prediction: Tensor, y: Tensor) -> Tensor:
            return F.cross_entropy(self.scale * prediction, y)

    with pytest.raises(ValueError, match="criterion has parameters"):
        learner_of(network(), at=["1"], classes=CLASSES, example=batch()[0], criterion=Scaled())
