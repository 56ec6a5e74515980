"""A block that was cut from a model: a graph that shares the model's submodules, parameters and buffers."""

from __future__ import annotations

import operator
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate, map_arg

from blocklocal.modes import Training


class Block(fx.GraphModule):
    """A part of a model's forward pass. It takes the features, block 0 the model's inputs, and then its side inputs.

    It is pickled as its graph: torch.fx would trace the code again, and freeze the sizes in it.
    """

    @property
    def inputs(self) -> list[str]:
        """The names of what it takes."""
        return [str(node.target) for node in self.graph.nodes if node.op == "placeholder"]

    def __reduce__(self) -> tuple[Any, ...]:
        place: Any = {node: Place(i) for i, node in enumerate(self.graph.nodes)}
        steps = [
            (node.op, node.target, *map_arg((node.args, dict(node.kwargs)), place.__getitem__))
            for node in self.graph.nodes
        ]
        parts = {name: operator.attrgetter(name)(self) for name in _names(self.graph)}
        return _restored, (steps, parts, set(self.state_dict()), self.training, type(self).__name__)


@dataclass(frozen=True)
class Place:
    """Stands for a node of a graph that is pickled."""

    index: int


def block_of(model: nn.Module, graph: fx.Graph, *, name: str) -> Block:
    """The module that runs a graph of parts of `model`."""
    parts: dict[str, Any] = {}
    for path in _names(graph):
        owner, _, last = path.rpartition(".")
        if last == Training.NAME:
            parts[path] = Training().train(model.get_submodule(owner).training)
        else:
            parts[path] = operator.attrgetter(path)(model)
    return _built(graph, parts, saved=model.state_dict().keys(), training=model.training, name=name)


def _built(graph: fx.Graph, parts: Mapping[str, Any], *, saved: Collection[str], training: bool, name: str) -> Block:
    block = Block(dict(parts), graph, class_name=name)
    block.training = training
    for path, part in parts.items():
        if isinstance(part, Tensor) and not isinstance(part, nn.Parameter):
            owner, _, last = path.rpartition(".")
            block.get_submodule(owner).register_buffer(last, part, persistent=path in saved)
    return block


def _restored(steps: list[tuple[Any, ...]], parts: dict[str, Any], saved: set[str], training: bool, name: str) -> Block:
    graph, nodes = fx.Graph(), []

    def of(value: Any) -> Any:
        return nodes[value.index] if isinstance(value, Place) else value

    for op, target, args, kwargs in steps:
        args, kwargs = map_aggregate((args, kwargs), of)
        nodes.append(graph.create_node(op, target, args, kwargs))
    return _built(graph, parts, saved=saved, training=training, name=name)


def _names(graph: fx.Graph) -> list[str]:
    """Those of the parts that a graph reads."""
    return list(dict.fromkeys(str(node.target) for node in graph.nodes if node.op in ("call_module", "get_attr")))
