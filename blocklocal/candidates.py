"""Where a model can be cut: the submodules whose output alone is read by what follows."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

from torch import fx, nn

from blocklocal.graph import deepest, few
from blocklocal.recompute import NORMS
from blocklocal.segments import bypassing, cut_at, has_features, place_of
from blocklocal.values import Inputs, arguments_of


class Places:
    """The places where a border could stand, in the order of the forward pass.

    nodes: the value that would cross it, by the submodule after which it stands.
    """

    def __init__(self, model: nn.Module, *, example: Inputs | None = None) -> None:
        self.model = model
        arguments = None if example is None else arguments_of(model, few(model, example))
        self.traced = deepest(model, arguments=arguments)
        order = {node: i for i, node in enumerate(self.traced.graph.nodes)}
        final = next(iter(reversed(self.traced.graph.nodes))).args[0]
        names: dict[fx.Node, str] = {}
        self._bypassed: list[tuple[str, fx.Node]] = []
        for name, nodes in self.traced.outputs.items():
            node = place_of(self.traced, nodes[0])
            if len(nodes) > 1 or node is final or not has_features(self.traced, node):
                continue
            if beside := bypassing(self.traced, node):
                self._bypassed.append((name, beside[0]))
                continue
            names[node] = min(name, names.get(node, name), key=len)
        self.nodes = {names[node]: node for node in sorted(names, key=order.__getitem__)}

    def useful(self) -> list[str]:
        """The cuts directly before a weight matrix or kernel that no parameter or running statistics bridge.

        Layers without one (normalisation, activation, dropout, pooling) belong to the block of the layer before them.
        """
        weighs = [any(parameter.dim() > 1 for parameter in segment.parameters()) for segment in self._chain]
        spans = [(used[0][0], used[-1][0]) for used in self._uses]
        return [
            name
            for k, name in enumerate(self.nodes)
            if weighs[k + 1] and any(weighs[: k + 1]) and not any(first <= k < last for first, last in spans)
        ]

    def hindrance(self) -> str:
        """What keeps the model from being cut at more places, the end of a sentence; empty where nothing is known."""
        shared = [used for used in self._uses if used[0][0] < used[-1][0]]
        if shared:
            (_, name), *_, (_, other) = max(shared, key=lambda used: used[-1][0] - used[0][0])
            also = f", which is {other!r} too" * (other != name)
            return f": no border may stand between two uses of {name!r}{also}; give each use a weight of its own"
        if self.traced.whole:
            name, why = next(iter(self.traced.whole.items()))
            return f": {name!r} is not cut inside, since {why}; bll.Hooked, which traces nothing, may cut it"
        if self._bypassed:
            name, node = self._bypassed[0]
            return f": {describe(node)} bypasses {name!r}, for one"
        return ""

    @cached_property
    def _chain(self) -> Sequence[nn.Module]:
        return cut_at(self.model, self.traced, list(self.nodes.values()))

    @cached_property
    def _uses(self) -> list[list[tuple[int, str]]]:
        """For each parameter and each layer with running statistics, the segments that use it and its name there."""
        uses: dict[nn.Parameter | nn.Module, list[tuple[int, str]]] = {}
        for k, segment in enumerate(self._chain):
            for part, name in changing(segment).items():
                uses.setdefault(part, []).append((k, name))
        return [*uses.values()]


def candidates(model: nn.Module, *, example: Inputs | None = None) -> list[str]:
    """All submodules after which the model can be cut into blocks that learn, in the order of the forward pass."""
    return Places(model, example=example).useful()


def places(model: nn.Module) -> list[str]:
    """All submodules whose output alone is read by what follows, in the same order, even layers without weights."""
    return list(Places(model).nodes)


def changing(block: nn.Module) -> dict[nn.Parameter | nn.Module, str]:
    """What a step changes in a block, the parameters and the layers with running statistics, with their names."""
    norms = {
        norm: name or type(norm).__name__
        for name, norm in block.named_modules()
        if isinstance(norm, NORMS) and norm.track_running_stats
    }
    return {**{parameter: name for name, parameter in block.named_parameters()}, **norms}


def describe(node: fx.Node) -> str:
    """A value of the forward pass in words."""
    if node.op == "placeholder":
        return f"the input {node.name!r}"
    if node.op == "call_module":
        return f"the output of submodule {node.target!r}"
    operation = getattr(node.target, "__name__", node.target)
    return f"the value {operation}({', '.join(map(str, node.args))})"
