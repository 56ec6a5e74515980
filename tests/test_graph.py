"""Tracing through containers and no deeper; what crosses a place of the graph, against sets."""

import operator
from itertools import pairwise

import pytest
import torch
import zoo
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, fx, nn

from blocklocal.graph import crossing, expand, mode, trace


@st.composite
def graphs(draw: st.DrawFn) -> fx.Graph:
    """Sums of earlier values, in a random pattern; one value is a parameter's."""
    graph = fx.Graph()
    nodes = [graph.placeholder("x"), graph.get_attr("weight")]
    for _ in range(draw(st.integers(1, 8))):
        left, right = draw(st.sampled_from(nodes)), draw(st.sampled_from(nodes))
        nodes.append(graph.call_function(operator.add, (left, right)))
    graph.output(nodes[-1])
    return graph


@given(graphs())
def test_crossing_values_are_made_before_and_used_after(graph: fx.Graph) -> None:
    nodes = list(graph.nodes)
    for i, node in enumerate(nodes):
        used_after = {argument for later in nodes[i + 1 :] for argument in later.all_input_nodes}
        expected = [value for value in nodes[: i + 1] if value in used_after and value.op != "get_attr"]
        assert crossing(graph, node) == expected


def called(graph: fx.Graph) -> list[str]:
    return [str(node.target) for node in graph.nodes if node.op == "call_module"]


def test_modules_that_are_no_containers_are_one_call() -> None:
    model, _ = zoo.residual()
    assert called(trace(model, containers=frozenset()).graph) == [
        "stem",
        "stages.0",
        "stages.1",
        "stages.2",
        "dropout",
        "fc",
    ]
    traced = trace(model, containers=frozenset({"stages", "stages.1"}))
    assert called(traced.graph) == ["stem", "stages.0", "stages.1.0", "stages.1.1", "stages.2", "dropout", "fc"]
    assert [node.target for node in traced.outputs["stages.1"]] == ["stages.1.1"]  # what the container gives


def test_outputs_are_listed_per_call() -> None:
    unit = zoo.Residual(3, 3)
    outputs = trace(unit, containers=frozenset()).outputs
    assert {name: len(nodes) for name, nodes in outputs.items()} == {
        "conv1": 1, "bn1": 1, "relu": 2, "conv2": 1, "bn2": 1,
    }  # fmt: skip


def test_expansion_stops_at_what_cannot_be_traced() -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(6, 6), zoo.Branching(6)), nn.TransformerEncoderLayer(6, 2))
    assert expand(model) == {"0"}
    assert expand(zoo.nested()[0]) == {"outer.a", "outer.a.1", "outer.b", "outer.b.0", "outer.b.0.0"}
    with pytest.raises(ValueError, match="the forward pass of Branching cannot be traced"):
        expand(zoo.Branching(6))


def test_a_trace_computes_what_the_model_does() -> None:
    for make in zoo.MODELS:
        model, x = make()
        model.eval()
        whole = fx.GraphModule(model, trace(model, containers=expand(model)).graph)
        assert torch.equal(whole(x), model(x))


def test_modes_come_back_after_an_error() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout())
    model[1].eval()

    def fail() -> None:
        with mode(model, training=False):
            assert not any(module.training for module in model.modules())
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert [module.training for module in model.modules()] == [True, True, False]


def test_inputs_without_default_are_all_there_is() -> None:
    class Options(nn.Module):
        def forward(
            self, x: Tensor, y: Tensor, scale: float = 2.0, *more: Tensor, flag: bool = False, **rest
        ) -> Tensor:
            return x * scale + y if not flag else x

    graph = trace(Options(), containers=frozenset()).graph
    assert [node.name for node in graph.nodes if node.op == "placeholder"] == ["x", "y"]
    assert fx.GraphModule({}, graph)(torch.tensor(3.0), torch.tensor(1.0)) == 7.0


def test_nodes_are_in_the_order_of_the_forward_pass() -> None:
    model, _ = zoo.nested()
    traced = trace(model, containers=expand(model))
    order = {node: i for i, node in enumerate(traced.graph.nodes)}
    places = [order[traced.outputs[name][0]] for name in ("outer.a.0", "outer.a", "outer.b.0", "outer.b", "last")]
    assert all(earlier < later for earlier, later in pairwise(places))
