"""Cutting models: blocks compose to the model and share everything with it."""

from collections.abc import Callable
from functools import cache

import pytest
import torch
import zoo
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import blocklocal as bll
from blocklocal.candidates import candidates
from blocklocal.lab.models import MODELS, build
from blocklocal.split import cut

Zoo = Callable[[], tuple[nn.Module, Tensor]]
each_model = pytest.mark.parametrize("make", zoo.MODELS, ids=lambda make: make.__name__)


names = cache(lambda make: candidates(make()[0]))  # the cuts of a model depend on its class alone


def results(module: nn.Module, x: Tensor) -> dict[object, Tensor]:
    """Output, gradient of each parameter and each buffer afterwards, of one pass with the same random numbers."""
    before = {buffer: buffer.clone() for buffer in module.buffers()}
    module.zero_grad()
    torch.manual_seed(0)
    y = module(x)
    y.square().sum().backward()
    found: dict[object, Tensor] = {"output": y.detach()}
    found |= {p: p.grad.clone() for p in module.parameters() if p.grad is not None}
    found |= {buffer: buffer.clone() for buffer in before}
    for buffer, value in before.items():
        buffer.copy_(value)
    return found


@each_model
@settings(max_examples=10)
@given(data=st.data())
def test_random_cuts_compose_to_the_model(make: Zoo, data: st.DataObject) -> None:
    torch.manual_seed(0)
    model, x = make()
    at = data.draw(st.lists(st.sampled_from(names(make)), unique=True, min_size=1))
    model.train(data.draw(st.booleans()))
    whole = results(model, x)
    chain = cut(model, at=at)
    assert len(chain) == len(at) + 1
    parts = results(chain, x)
    assert whole.keys() == parts.keys()
    assert all(torch.equal(value, parts[key]) for key, value in whole.items())


@pytest.mark.parametrize("name", MODELS)
def test_built_in_models(name: str) -> None:
    model, x = build(name, channels=3, size=(8, 8), classes=10).eval(), torch.randn(2, 3, 8, 8)
    places = candidates(model)
    assert len(places) >= 4
    for at in (places[::2], places[1::2]):
        assert torch.equal(cut(model, at=at)(x), model(x))


@each_model
def test_blocks_keep_the_names_of_the_model(make: Zoo) -> None:
    model, _ = make()
    parameters, keys = dict(model.named_parameters()), []
    for block in cut(model, at=names(make)):
        assert all(parameters[name] is p for name, p in block.named_parameters())
        keys += block.state_dict()
    assert sorted(keys) == sorted(model.state_dict())


def test_candidates() -> None:
    """Places that a weight follows at once; a normalisation or activation belongs to the layer before it."""
    assert candidates(zoo.perceptron()[0]) == ["1", "4"]
    assert candidates(zoo.residual()[0]) == ["stem", "stages.0", "stages.1.0", "stages.1", "dropout"]
    assert candidates(zoo.inception()[0]) == ["stem", "stages.1", "dropout"]
    assert candidates(zoo.nested()[0]) == ["outer.a.1.0", "outer.a", "outer.b.0", "outer.b"]
    assert candidates(zoo.branching()[0]) == ["0", "1", "2"]
    assert candidates(zoo.transformer()[0]) == ["embedding", "layers.0", "layers.1", "norm"]


def test_a_list_and_a_sequential_are_chains_as_they_stand() -> None:
    layers = [nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)]
    for chain in (bll.split(layers), bll.split(nn.Sequential(*layers))):
        assert list(chain) == layers
    assert [len(list(block.children())) for block in bll.split(layers, at=["1"])] == [2, 1]


def test_one_block_is_the_model_itself() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    assert list(bll.split(model, blocks=1)) == [model]


@pytest.mark.parametrize("balance", ["time", "memory"])
@each_model
def test_balanced_blocks_compose_to_the_model(make: Zoo, balance: str) -> None:
    model, x = make()
    model.eval()
    chain = bll.split(model, blocks=3, example=x, balance=balance)  # type: ignore[arg-type]
    assert len(chain) == 3
    assert torch.equal(chain(x), model(x))
    assert all(any(True for _ in block.parameters()) for block in chain)


def test_arguments_with_a_default_keep_it() -> None:
    class Options(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x: Tensor, sizes: tuple = (2, 3), mask: Tensor | None = None, *, flag: bool = True) -> Tensor:
            h = self.a(x).unflatten(-1, sizes).flatten(1)
            return self.b(h if flag and mask is None else h * mask)

    model, x = Options(), torch.randn(4, 6)
    chain = bll.split(model, at=["a"])
    assert torch.equal(chain(x), model(x))
    assert [[node.name for node in block.graph.nodes if node.op == "placeholder"] for block in chain] == [["x"], ["h"]]  # type: ignore[union-attr]


def test_modes_are_restored() -> None:
    model, x = zoo.residual()
    model.eval()
    model.stem.train()  # type: ignore[union-attr]
    before = [module.training for module in model.modules()]
    bll.split(model, blocks=2, example=x)
    assert [module.training for module in model.modules()] == before


def test_tensors_of_containers_are_the_models_own() -> None:
    model = zoo.Transformer()
    chain = bll.split(model, at=["embedding", "layers.1"])
    tensors = {**dict(chain[1].named_parameters()), **dict(chain[2].named_buffers())}
    assert tensors["positions"] is model.positions
    assert tensors["shift"] is model.shift
    scaled, _ = zoo.nested()
    assert "scale" not in bll.split(scaled, at=["outer.a"])[1].state_dict()  # not persistent there, nor here


def test_an_activation_shared_by_all_layers_is_no_matter() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c, self.relu = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6), nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            return self.c(self.relu(self.b(self.relu(self.a(x)))))

    model, x = Plain(), torch.randn(2, 6)
    chain = bll.split(model, at=["a", "b"])
    assert torch.equal(chain(x), model(x))
    assert all(block.get_submodule("relu") is model.relu for block in (chain[1], chain[2]))
