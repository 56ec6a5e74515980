"""One graph of the forward passes in training and in evaluation mode."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import UntypedStorage, fx, nn

from blocklocal.decisions import decided
from blocklocal.interpreter import Interpreter
from blocklocal.tracer import ContainerTracer

Number = bool | int | float


@dataclass(frozen=True)
class Trace:
    """A graph and, for each submodule that it calls, the nodes that hold the submodule's output, one per call.

    known: what the nodes compute from the example, None where there was none; again: the same for a batch with one
    sample more. whole: the containers that could not be traced through, and why.
    """

    graph: fx.Graph
    outputs: dict[str, list[fx.Node]]
    known: Interpreter | None
    again: dict[fx.Node, Any]
    whole: Mapping[str, str] = field(default_factory=dict)


class Obstacle(ValueError):
    """A forward pass that cannot be traced, and the container that is in the way."""

    def __init__(self, message: str, *, container: str) -> None:
        super().__init__(message)
        self.container = container


class Training(nn.Module):
    """Whether the container whose part it is in a block is in training mode. A graph records calls of modules."""

    NAME = "_training"

    def forward(self) -> bool:
        return self.training


def choose(training: Any, in_training: Any, in_evaluation: Any) -> Any:
    """What a container passes on in training mode, and in evaluation mode."""
    if isinstance(training, fx.Proxy):  # in a block that is cut again
        return training.tracer.create_proxy("call_function", choose, (training, in_training, in_evaluation), {})
    return in_training if training else in_evaluation


def both_modes(evaluated: ContainerTracer, trained: ContainerTracer, *, where: str) -> Trace:
    """The graph of evaluation mode, in which what a container passes on in one mode alone, as in `dropout(h,
    training=self.training)`, is chosen when it runs.

    ValueError: they call different functions.
    """
    pairs = list(zip(evaluated.graph.nodes, trained.graph.nodes, strict=False))
    partner: dict[fx.Node, fx.Node] = dict(pairs)
    node = pairs[0][0]
    try:
        for node, other in pairs:
            if (node.op, str(node.target)) != (other.op, str(other.target)):
                raise _Different
            if node.target is decided and node.args[1] != other.args[1]:
                raise Obstacle(
                    f"the forward pass of {where} decides on {node.args[2]}, which differs with the size of the batch, "
                    f"{node.args[1]} for example= and {other.args[1]} with one sample more: move this into a "
                    "submodule, or cut outside it",
                    container=evaluated.owners[node],
                )
            args = _chosen(evaluated, node, node.args, other.args, partner=partner)
            kwargs = _chosen(evaluated, node, dict(node.kwargs), dict(other.kwargs), partner=partner)
            node.args, node.kwargs = args, kwargs
    except _Different:
        raise Obstacle(
            f"the forward pass of {where} differs between training and evaluation mode: "
            "move what depends on self.training into a submodule of its own, such as nn.Dropout, or cut outside it",
            container=evaluated.owners[node],
        ) from None
    known, again = evaluated.known, {}
    if known is not None and trained.known is not None:
        known.data &= {node for node, other in pairs if other in trained.known.data}
        for node, other in pairs:
            if other in trained.known.values:
                again[node] = trained.known.values[other]
            if other in trained.known.writes:
                known.writes.setdefault(node, set()).update(_storages(evaluated, node))
        for node in evaluated.graph.nodes:
            if node not in partner:  # a choice, which each block can make
                known.values[node] = again[node] = None
                known.data.add(node)
                known.about.add(node)
    return Trace(evaluated.graph, evaluated.outputs, known, again)


class _Different(Exception):
    """The graphs of the two modes differ."""


def _chosen(
    tracer: ContainerTracer, node: fx.Node, ours: Any, theirs: Any, *, partner: Mapping[fx.Node, fx.Node]
) -> Any:
    """An argument of `node` that is ours in evaluation mode and theirs in training mode."""
    if isinstance(ours, fx.Node):
        if partner.get(ours) is not theirs:
            raise _Different
        return ours
    if isinstance(ours, tuple | list) and isinstance(theirs, tuple | list) and len(ours) == len(theirs):
        parts = [_chosen(tracer, node, a, b, partner=partner) for a, b in zip(ours, theirs, strict=True)]
        return parts if isinstance(ours, list) else tuple(parts)
    if isinstance(ours, Mapping) and isinstance(theirs, Mapping) and [*ours] == [*theirs]:
        return {name: _chosen(tracer, node, ours[name], theirs[name], partner=partner) for name in ours}
    if isinstance(ours, slice) and isinstance(theirs, slice):
        ends = [(getattr(ours, end), getattr(theirs, end)) for end in ("start", "stop", "step")]
        return slice(*(_chosen(tracer, node, a, b, partner=partner) for a, b in ends))
    if ours is theirs or (type(ours) is type(theirs) and ours == theirs):
        return ours
    if not (isinstance(ours, Number) and isinstance(theirs, Number)):
        raise _Different
    owner = tracer.owners[node]
    with tracer.graph.inserting_before(node):
        flag = tracer.graph.call_module(f"{owner}.{Training.NAME}".removeprefix("."))
        return tracer.graph.call_function(choose, (flag, theirs, ours))


def _storages(tracer: ContainerTracer, node: fx.Node) -> set[UntypedStorage]:
    """The storages of what a node is given, into which it may write."""
    assert tracer.known is not None
    return {storage for one in node.all_input_nodes for storage in tracer.known.storages(one)}
