"""The graph of a forward pass, cut at borders into segments.

One tensor crosses a border, the features. Beside it a segment may need

- data: what is computed from the model's inputs and buffers alone, such as masks and positions. The segment computes
  it again, from the inputs that it takes for that;
- sizes, types and devices of earlier features, and of inputs that it does not take: those of its own features where
  they are the same, or else a constant. The segment before checks that this is so.

Anything else bypasses the border.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg

from blocklocal.block import Block, block_of
from blocklocal.decisions import decided, describe
from blocklocal.interpreter import outline
from blocklocal.modes import Trace
from blocklocal.values import features, is_real


@dataclass(frozen=True)
class Needs:
    """What a segment is made of. nodes: those that it runs. carried: sizes and types that it takes from its features.
    bypassing: values that it cannot have."""

    nodes: set[fx.Node]
    carried: list[fx.Node]
    bypassing: list[fx.Node]


class Segments:
    """The segments of a graph between `places`, the nodes whose values cross a border, in their order."""

    def __init__(self, traced: Trace, places: Sequence[fx.Node]) -> None:
        self.traced, self.places, self.known = traced, places, traced.known
        self.position = {node: i for i, node in enumerate(traced.graph.nodes)}
        ends = [self.position[place] for place in places]
        self.home = {node: sum(end < i for end in ends) for node, i in self.position.items()}
        """The segment in which a node first can run."""
        for node in traced.graph.nodes:
            if self._is_data(node):
                self.home[node] = max((self.home[one] for one in node.all_input_nodes), default=0)
        self.ends = [*ends, len(self.position) - 1]
        self.sources: dict[fx.Node, set[fx.Node]] = {}
        """The inputs and features that each node's value comes from, as far as it is data."""
        for node in traced.graph.nodes:
            is_source = node.op == "placeholder" or not self._is_data(node)
            self.sources[node] = {node} if is_source else set().union(*(self.sources[n] for n in node.all_input_nodes))

    def needs(self, k: int, more: Sequence[fx.Node] = ()) -> Needs:
        """What segment k needs to run its own nodes and `more` of them."""
        needs = self._needs(k, more, taken=set())
        taken = {node for node in needs.nodes if node.op == "placeholder"}
        return self._needs(k, more, taken=taken) if taken else needs

    def _needs(self, k: int, more: Sequence[fx.Node], *, taken: set[fx.Node]) -> Needs:
        own = [
            node
            for node in self.traced.graph.nodes
            if self.home[node] == k and (not self._is_data(node) or node.target is decided)
        ]
        found, carried, bypassing = set(), [], []
        seen, waiting = set(), [*own, *self.places[k : k + 1], *more]
        while waiting:
            node = waiting.pop()
            if node in seen or self.arrives(node, k):
                continue
            seen.add(node)
            if self._is_about(node) and self.home[node] < k:
                far = {one for one in self.sources[node] - taken if not self.arrives(one, k)}
                if far and self._follows_from(node, self.places[k - 1]):
                    carried.append(node)
                    continue
                if far and self._tells(node):
                    (carried if self._can_replace(node, self.places[k - 1]) else bypassing).append(node)
                    continue
            if self._is_data(node):
                writers = self._writers(node, before=self.ends[k])
                if k > 0 and (self._writes_inputs(node, writers) or not all(map(self._is_data, writers))):
                    bypassing.append(node)
                waiting += writers
            elif self.home[node] < k and node.op != "get_attr":
                bypassing.append(node)
                continue
            found.add(node)
            waiting += node.all_input_nodes
        order = self.position.__getitem__
        return Needs(found, sorted(carried, key=order), sorted(bypassing, key=order))

    def graphs(self) -> list[fx.Graph]:
        """The graph of each segment."""
        graphs: list[fx.Graph] = []
        carried: list[fx.Node] = []  # by the segment after
        for k in reversed(range(len(self.ends))):
            needs = self.needs(k, carried)
            assert not needs.bypassing
            graphs.append(self._graph(k, needs, checked=carried))
            carried = needs.carried
        return graphs[::-1]

    def _graph(self, k: int, needs: Needs, *, checked: list[fx.Node]) -> fx.Graph:
        graph = fx.Graph()
        values: dict[fx.Node, Any] = {}
        if k > 0:
            names = {str(node.target) for node in self.traced.graph.nodes if node.op == "placeholder"}
            h = graph.placeholder("features" if "h" in names else "h")
            values |= {node: h for node in self.position if self._is_features(node, self.places[k - 1])}
        nodes = sorted(needs.nodes, key=self.position.__getitem__)
        values |= {node: graph.node_copy(node) for node in nodes if node.op == "placeholder"}
        for node in needs.carried:
            values[node] = self._expression(graph, node, self.places[k - 1], h=values[self.places[k - 1]])
        for node in nodes:
            if node not in values and node.op != "output":
                values[node] = graph.node_copy(node, values.__getitem__)
        if k < len(self.places):
            place = self.places[k]
            for node in checked:
                expected = self._expression(graph, node, place, h=values[place])
                graph.call_function(decided, (values[node], expected, describe(node)))
            graph.output(values[place])
        else:
            (returned,) = next(iter(reversed(self.traced.graph.nodes))).args
            graph.output(map_arg(returned, values.__getitem__))
        return graph

    def _is_data(self, node: fx.Node) -> bool:
        return self.known is not None and node in self.known.data

    def _is_about(self, node: fx.Node) -> bool:
        return self.known is not None and node in self.known.about

    def _tells(self, node: fx.Node) -> bool:
        """Whether a node tells what features are like: it asks a tensor that is no data."""
        return self._is_about(node) and not all(map(self._is_data, node.all_input_nodes))

    def arrives(self, node: fx.Node, k: int) -> bool:
        """Whether it is the features that segment k takes."""
        return k > 0 and self._is_features(node, self.places[k - 1])

    def _is_features(self, node: fx.Node, place: fx.Node) -> bool:
        """Whether a node's value is that of `place`: the same tensor, under another name."""
        if node is place or self.known is None or node not in self.known.values:
            return node is place
        same = self.known.values[node] is self.known.values[place]
        return same and (self.position[node] < self.position[place] or node.target is operator.getitem)

    def _writers(self, node: fx.Node, *, before: int) -> list[fx.Node]:
        """The nodes that write into what a node returns, as far as they are no later than a segment's end."""
        assert self.known is not None
        if not self.known.writes:
            return []
        storages = self.known.storages(node)
        return [w for w, into in self.known.writes.items() if into & storages and self.position[w] <= before]

    def _writes_inputs(self, node: fx.Node, writers: list[fx.Node]) -> bool:
        assert self.known is not None
        given = [self.known.storages(one) for one in self.position if one.op == "placeholder"] if writers else []
        return any(self.known.storages(node) & one for one in given)

    def _can_replace(self, node: fx.Node, place: fx.Node) -> bool:
        assert self.known is not None
        return _can_replace(self.known.values[node], self.traced.again[node], self._sizes(place))

    def _follows_from(self, node: fx.Node, place: fx.Node) -> bool:
        """Whether a node's value is the device of the features there, or the length of one dimension of them and of no
        other, or a tuple of such."""
        assert self.known is not None
        device, sizes = self.known.values[place].device, self._sizes(place)

        def follows(value: Any, again: Any) -> bool:
            if isinstance(value, tuple):
                return len(value) == len(again) and all(map(follows, value, again))
            return value == device or (_is_size(value) and sizes.count((value, again)) == 1)

        return follows(self.known.values[node], self.traced.again[node])

    def _sizes(self, place: fx.Node) -> list[tuple[int, int]]:
        """Each dimension of the features there, with that for a batch of one sample more."""
        assert self.known is not None
        return list(zip(self.known.values[place].shape, self.traced.again[place].shape, strict=True))

    def _expression(self, graph: fx.Graph, node: fx.Node, place: fx.Node, *, h: fx.Node) -> Any:
        """What stands for the value of a node that tells what earlier features were like, in the segment behind."""
        assert self.known is not None
        sizes = self._sizes(place)

        def of(value: Any, again: Any) -> Any:
            if isinstance(value, Tensor):
                shape = tuple(map(of, value.shape, again.shape))
                return graph.call_function(outline, (shape, value.dtype, of(value.device, again.device)))
            if isinstance(value, tuple):
                parts = tuple(map(of, value, again))
                return graph.call_function(torch.Size, (parts,)) if isinstance(value, torch.Size) else parts
            if _is_size(value) and (value, again) in sizes:
                return graph.call_method("size", (h, sizes.index((value, again))))
            return graph.call_function(getattr, (h, "device")) if isinstance(value, torch.device) else value

        return of(self.known.values[node], self.traced.again[node])


def _can_replace(value: Any, again: Any, sizes: list[tuple[int, int]]) -> bool:
    """Whether constants and these sizes are enough to give a value for the example, and again for another batch."""
    if isinstance(value, Tensor):
        return value.dtype == again.dtype and _can_replace(value.shape, again.shape, sizes)
    if isinstance(value, tuple):
        parts = zip(value, again, strict=False)
        return len(value) == len(again) and all(_can_replace(a, b, sizes) for a, b in parts)
    return value == again or (_is_size(value) and (value, again) in sizes)


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def place_of(traced: Trace, node: fx.Node) -> fx.Node:
    """The node of the features in what a submodule returns at `node`."""
    if traced.known is None or isinstance(traced.known.values[node], Tensor):
        return node
    found = features(traced.known.values[node])
    same = [one for one in node.users if found is not None and traced.known.values.get(one) is found[0]]
    return same[0] if same else node


def has_features(traced: Trace, place: fx.Node) -> bool:
    return traced.known is None or is_real(traced.known.values[place])


def follows(traced: Trace, place: fx.Node) -> bool:
    """Whether anything is computed from the features at `place`."""
    data = set() if traced.known is None else traced.known.data
    segments = Segments(traced, [place])
    return any(
        home == 1 and node.op not in ("output", "get_attr") and node not in data and not segments.arrives(node, 1)
        for node, home in segments.home.items()
    )


def bypassing(traced: Trace, place: fx.Node) -> list[fx.Node]:
    """The values that bypass a border at `place`."""
    return Segments(traced, [place]).needs(1).bypassing


def cut_at(model: nn.Module, traced: Trace, places: Sequence[fx.Node]) -> list[Block]:
    """The blocks between the places."""
    graphs = Segments(traced, places).graphs()
    return [block_of(model, graph, name=f"Block{k}") for k, graph in enumerate(graphs)]
