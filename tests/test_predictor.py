"""Predictors of either learner: equal to the learner to the bit, with the weights that they need and no other."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_hooked import CLASSES, Masked, Unit, batch, both, network, tokens
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

import blocklocal as bll

EXITS = [None, 0, 1, 2, "all"]


def sizes(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("exit", EXITS)
@pytest.mark.parametrize("settings", [{}, {"add_beliefs": True}, {"loss": bll.Predictive("evidence")}], ids=str)
def test_both_predict_what_the_learners_do(exit, settings: dict) -> None:
    x, y = batch()
    chain, hooked = both(**settings)
    for learner in (chain, hooked):
        learner.backward(x, y, optimizers=[torch.optim.SGD(learner.block_parameters(k), lr=0.1) for k in range(3)])
        learner.fit_exits([(x, y)])
        learner.eval()
    predictors = [learner.predictor(exit=exit) for learner in (chain, hooked)]
    for learner, predictor in zip((chain, hooked), predictors, strict=True):
        assert torch.equal(predictor(x), learner.predict(x, exit=exit))
        assert set(predictor.parameters()) <= set(learner.parameters())
    assert sizes(predictors[0]) == sizes(predictors[1])


@pytest.mark.parametrize("exit", [0, "all"])
def test_what_is_exported_holds_the_same_weights(exit) -> None:
    x, _ = batch()
    _, learner = both(add_beliefs=True)
    predictor = learner.eval().predictor(exit=exit)
    exported = torch.export.export(predictor, (x,))
    assert_close(exported.module()(x), predictor(x))
    weights = [exported.state_dict[name] for name in exported.graph_signature.parameters]
    assert sum(weight.numel() for weight in weights) == sizes(predictor)


@pytest.mark.parametrize("k", [0, 1, 2])
def test_an_early_exit_holds_what_its_gradient_reaches(k: int) -> None:
    """The parameters that autograd finds are those that are there, and no layer without one of them has a buffer."""
    x, _ = batch()
    _, learner = both()
    predictor = learner.predictor(exit=k).eval()
    predictor(x).sum().backward()
    assert all(parameter.grad is not None for parameter in predictor.parameters())
    layers = {name.split(".")[0] for name in predictor.model.state_dict()}
    assert layers == {"0", "1", *(["2", "3"] if k > 0 else []), *(["6"] if k > 1 else [])}


def test_it_shares_the_learners_weights_and_outlives_its_hooks() -> None:
    x, y = batch()
    _, learner = both()
    predictor = learner.predictor(exit=1)
    learner.backward(x, y)
    torch.optim.SGD(learner.parameters(), lr=0.1).step()
    learner.eval()
    expected = learner.predict(x, exit=1)
    learner.remove()
    assert torch.equal(predictor.eval()(x), expected)
    kept = io.BytesIO()
    torch.save(predictor, kept)
    kept.seek(0)
    assert torch.equal(torch.load(kept, weights_only=False)(x), expected)


def test_inputs_by_name_and_outputs_of_any_kind() -> None:
    inputs, y = tokens()
    learner = bll.Hooked(Masked(), at=["layers.0", "layers.1"], classes=CLASSES, example=inputs)
    learner.backward(inputs, y)
    learner.eval()
    for exit in EXITS:
        predictor = learner.predictor(exit=exit)
        assert torch.equal(predictor(**inputs), learner.predict(inputs, exit=exit))
    exported = torch.export.export(learner.predictor(exit=1), (), kwargs=dict(inputs)).module()
    assert_close(exported(**inputs), learner.predict(inputs, exit=1))


class Peculiar(nn.Module):
    """Frozen positions at its root, statistics without a parameter, and a late layer that some inputs need early."""

    def __init__(self) -> None:
        super().__init__()
        self.positions = nn.Parameter(torch.randn(8), requires_grad=False)
        self.norm = nn.BatchNorm1d(8, affine=False)
        self.first, self.second, self.late = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.register_buffer("scale", torch.tensor(2.0))

    def forward(self, x: Tensor, *, early: bool = False, viewed: bool = False) -> Tensor:
        h = self.first(x + self.positions)
        if viewed:
            h = h + self.late.weight.flatten()[:8]
        if early:
            h = h + F.linear(h, self.late.weight).sum(1, keepdim=True)
        h = self.norm(h)
        assert self.late.weight.dtype == x.dtype
        return self.late(self.second(h).relu() * self.scale)


def test_what_no_gradient_reaches_stays_where_it_is_read() -> None:
    x = torch.randn(4, 8)
    learner = bll.Hooked(Peculiar(), at=["norm", "second"], classes=3, example=x).eval()
    early = learner.predictor(exit=0)
    assert {*early.model.state_dict()} == {
        "positions",
        *(f"norm.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")),
        *("first.weight", "first.bias"),
    }
    assert torch.equal(early(x), learner.predict(x, exit=0))
    with pytest.raises(ValueError, match=r"reads the weight 'late\.weight' of a later block"):
        early(x, early=True)
    with pytest.raises(AttributeError, match=r"reads the weight 'late\.weight' of a later block"):
        early(x, viewed=True)
    assert torch.equal(early(x), learner.predict(x, exit=0))


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # PyTorch warns of itself
def test_compiled_and_recomputed_layers() -> None:
    x, y = batch()
    _, learner = both()
    learner.model.get_submodule("1").compile(backend="eager")
    bll.recompute(learner.model.get_submodule("2"))
    learner.backward(x, y)
    learner.eval()
    for exit in EXITS:
        assert torch.equal(learner.predictor(exit=exit)(x), learner.predict(x, exit=exit))


@pytest.mark.filterwarnings("ignore:`torch.jit")  # which is deprecated
def test_a_model_that_cannot_be_copied_is_refused() -> None:
    class Script(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(4, 4)
            self.last: Any = torch.jit.trace(nn.Linear(4, 3), torch.randn(2, 4))

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.first(x))

    learner = bll.Hooked(Script(), at=["first"], classes=3, example=torch.randn(4, 4))
    with pytest.raises(ValueError, match="Script makes tensors of its own"):
        learner.predictor()


def test_cuts_are_what_at_takes() -> None:
    x, _ = batch()
    model = network()
    assert bll.BlockLocal(model, at=["3", "1"], classes=CLASSES, example=x).cuts == ["1", "3"]
    assert bll.BlockLocal(model, blocks=1, classes=CLASSES).cuts == []
    parts = [model[:2], model[2:4], model[4:]]
    assert bll.BlockLocal(parts, classes=CLASSES, example=x).cuts == ["0", "1"]
    assert bll.BlockLocal(nn.Sequential(*parts), classes=CLASSES, example=x).cuts == ["0", "1"]
    balanced = bll.BlockLocal(nn.Sequential(nn.Conv2d(3, 8, 1), nn.Sequential(Unit(8), Unit(8)), model[4:]),
                              blocks=3, classes=CLASSES, example=x)  # fmt: skip
    assert len(balanced.cuts) == 2
    for learner_of in (bll.BlockLocal, bll.Hooked):
        again = learner_of(balanced.model, at=balanced.cuts, classes=CLASSES, example=x)
        assert again.cuts == balanced.cuts
        mine, found = ([set(one.block_parameters(k)) & set(balanced.model.parameters()) for k in range(3)]
                       for one in (balanced, again))  # fmt: skip
        assert mine == found


@pytest.mark.parametrize("learner_of", [bll.BlockLocal, bll.Hooked])
def test_a_learner_is_saved_without_shared_memory(learner_of, tmp_path: Path) -> None:
    x, y = batch()

    def make(weight: float) -> bll.BlockLocal | bll.Hooked:
        criterion = nn.CrossEntropyLoss(weight=torch.full((CLASSES,), weight))
        return learner_of(network(), at=["1", "3"], classes=CLASSES, example=x, criterion=criterion)

    learner = make(2.0)
    learner.backward(x, y)
    state = {name: value for name, value in learner.state_dict().items() if not name.endswith("_extra_state")}
    save_file(state, tmp_path / "learner.safetensors")
    assert [name for name in state if "criterion" in name] == ["criterion.weight"]
    other, saved = make(1.0), load_file(tmp_path / "learner.safetensors")
    other.load_state_dict(saved | {"pool._extra_state": other.pool.get_extra_state()})
    for border in other.borders:
        assert isinstance(border, nn.Module)
        assert torch.equal(border.terms[1].criterion.weight, torch.full((CLASSES,), 2.0))  # pyright: ignore
    before = {f"borders.{k}.terms.1.criterion.weight": torch.ones(CLASSES) for k in range(2)}  # as version 0.1.0 had
    assert not any(other.load_state_dict(learner.state_dict() | before))
