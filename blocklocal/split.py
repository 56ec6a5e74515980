"""Cut a model into a chain of blocks: one value, and nothing else, crosses each border."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor, fx, nn

from blocklocal.balance import BorderLoss, Profile, measure, partition
from blocklocal.graph import Trace, crossing, expand, trace


def split(
    model: nn.Module | Sequence[nn.Module],
    *,
    at: Sequence[str] | None = None,
    blocks: int | None = None,
    example: Tensor | None = None,
    balance: Literal["time", "memory"] = "memory",
    border: BorderLoss | None = None,
) -> nn.Sequential:
    """Cut `model` into blocks; their composition is the model, with the model's own parameters, buffers and names.

    at: a border stands after each of these submodules (qualified names). blocks: so many blocks, such that the
    slowest is as fast ("time") or the largest as small ("memory") as can be, measured on the batch `example`; what the
    local losses cost counts where `border` makes them. With neither, a list of modules or an nn.Sequential is a chain
    as it stands.

    ValueError: a submodule that is not there or not called exactly once, a value that bypasses a border, parameters
    on both sides of one, more blocks than cuts.

    >>> chain = split(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), at=["1"])
    >>> [name for name, _ in chain[1].named_parameters()]
    ['2.weight', '2.bias']
    """
    if at is not None and blocks is not None:
        raise ValueError("at= and blocks= both say where to cut: pass one of them")
    if isinstance(at, str):
        raise ValueError(f"at={at!r}: pass a list of submodules, at=[{at!r}]")
    if not isinstance(model, nn.Module):
        model = nn.Sequential(*model)
        if at is None and blocks is None:
            return _checked(model)
    if at is not None:
        return cut(model, at=at)
    if blocks is None:
        if isinstance(model, nn.Sequential):
            return _checked(model)
        raise ValueError(f"where to cut {type(model).__name__}? Pass at=[submodules] or blocks=K")
    if blocks < 1:
        raise ValueError(f"blocks={blocks}: a chain has at least one block")
    if blocks == 1:
        return nn.Sequential(model)
    if balance not in ("time", "memory"):
        raise ValueError(f'balance={balance!r}: choose "time" or "memory"')
    if example is None:
        raise ValueError("blocks=K measures the model: pass example=, a batch of its input")
    places = candidates(model)
    if blocks > len(places) + 1:
        raise ValueError(
            f"blocks={blocks}: {type(model).__name__} can be cut at {len(places)} places only, "
            f"so {len(places) + 1} blocks at most"
        )
    profile = measure(list(cut(model, at=places)), example, border=border)
    return cut(model, at=[places[start - 1] for start in _starts(profile, blocks=blocks, balance=balance)])


def candidates(model: nn.Module) -> list[str]:
    """All submodules after which the model can be cut, in the order of the forward pass."""
    traced = trace(model, containers=expand(model))
    order = {node: i for i, node in enumerate(traced.graph.nodes)}
    final = next(iter(reversed(traced.graph.nodes))).args[0]
    names: dict[fx.Node, str] = {}
    for name, nodes in traced.outputs.items():
        node = nodes[0]
        if len(nodes) > 1 or node is final or crossing(traced.graph, node) != [node]:
            continue
        names[node] = min(name, names.get(node, name), key=len)
    ordered = [names[node] for node in sorted(names, key=order.__getitem__)]
    return _useful(model, traced, ordered)


def cut(model: nn.Module, *, at: Sequence[str]) -> nn.Sequential:
    """Cut `model` after each of the submodules `at`."""
    modules = dict(model.named_modules())
    for name in at:
        if name not in modules or not name:
            raise ValueError(f"at={name!r}: {type(model).__name__} has no such submodule; it has {_some(modules)}")
    containers = {prefix for name in at for prefix in _prefixes(name)}
    traced = trace(model, containers=frozenset(containers))
    inputs = [node.name for node in traced.graph.nodes if node.op == "placeholder"]
    if len(inputs) != 1:
        raise ValueError(f"{type(model).__name__} takes {len(inputs)} inputs ({', '.join(inputs)}): a chain has one")
    return _checked(_segments(model, traced, borders=_borders(traced, at=at)))


def _borders(traced: Trace, *, at: Sequence[str]) -> list[fx.Node]:
    """The nodes at whose values the borders stand, in the order of the forward pass."""
    order = {node: i for i, node in enumerate(traced.graph.nodes)}
    nodes: dict[fx.Node, str] = {}
    for name in at:
        calls = traced.outputs.get(name, [])
        if len(calls) != 1:
            raise ValueError(
                f"at={name!r}: a border needs a submodule called once, this one is called {len(calls)} times"
            )
        node = calls[0]
        if node in nodes:
            raise ValueError(f"at={name!r}: the same border as {nodes[node]!r}")
        bypassing = [value for value in crossing(traced.graph, node) if value is not node]
        if bypassing:
            raise ValueError(
                f"at={name!r}: {', '.join(map(_describe, bypassing))} bypasses the border, and only the output of "
                f"{name!r} may cross it; cut where the model is a chain"
            )
        if not node.users or order[node] >= len(order) - 2:
            raise ValueError(f"at={name!r}: no computation follows this submodule, so no block would stand after it")
        nodes[node] = name
    return sorted(nodes, key=order.__getitem__)


def _segments(model: nn.Module, traced: Trace, *, borders: list[fx.Node]) -> nn.Sequential:
    """The graph cut at the borders, as modules that share the model's submodules, parameters and buffers."""
    blocks, graph, values = [], fx.Graph(), {}

    def value(node: fx.Node) -> fx.Node:
        if node not in values:  # a parameter or buffer of a container, read in more than one block
            assert node.op == "get_attr"
            values[node] = graph.node_copy(node)
        return values[node]

    for node in traced.graph.nodes:
        if node.op != "get_attr":
            values[node] = graph.node_copy(node, value)
        if node in borders:
            graph.output(values[node])
            blocks.append(fx.GraphModule(model, graph, class_name=f"Block{len(blocks)}"))
            graph = fx.Graph()
            values = {node: graph.placeholder("h")}
    blocks.append(fx.GraphModule(model, graph, class_name=f"Block{len(blocks)}"))
    for block in blocks:
        share(model, block)
    return nn.Sequential(*blocks)


def share(model: nn.Module, block: fx.GraphModule) -> None:
    """Let a block cut from `model` hold the parameters and buffers that the model's containers hold now.

    A module is in its block itself. A container that was cut stands in a block as an empty module with the tensors
    that the block reads, and these go their own way as soon as the container replaces its own.
    """
    for path, stand_in in block.named_modules():
        container = model.get_submodule(path)
        if container is stand_in:
            continue
        for name in stand_in._parameters:
            stand_in._parameters[name] = container._parameters[name]
        for name in stand_in._buffers:
            if name in container._buffers:  # else a plain attribute
                stand_in._buffers[name] = container._buffers[name]
            if name not in container._buffers or name in container._non_persistent_buffers_set:
                stand_in._non_persistent_buffers_set.add(name)


def _checked(chain: nn.Sequential) -> nn.Sequential:
    """The chain, after a check that no parameter is on both sides of a border."""
    blocks = list(chain)
    for k, block in enumerate(blocks):
        names = {parameter: name for name, parameter in block.named_parameters()}
        for j, other in enumerate(blocks[:k]):
            for other_name, parameter in other.named_parameters():
                if parameter in names:
                    raise ValueError(
                        f"parameter {other_name!r} of block {j} is also {names[parameter]!r} of block {k}: "
                        "no border may stand between two uses of a parameter"
                    )
    return chain


def _useful(model: nn.Module, traced: Trace, names: list[str]) -> list[str]:
    """The cuts that a weight matrix or kernel follows at once, and that do not stand between two uses of a parameter.

    What follows a layer without one (normalisation, activation, dropout, pooling) belongs to the layer's block.
    """
    chain = _segments(model, traced, borders=[traced.outputs[name][0] for name in names])
    owners: dict[nn.Parameter, list[int]] = {}
    for k, segment in enumerate(chain):
        for parameter in segment.parameters():
            owners.setdefault(parameter, []).append(k)
    spans = [(used[0], used[-1]) for used in owners.values()]
    weighs = [any(parameter.dim() > 1 for parameter in segment.parameters()) for segment in chain]
    return [
        name
        for k, name in enumerate(names)
        if weighs[k + 1] and any(weighs[: k + 1]) and not any(first <= k < last for first, last in spans)
    ]


def _starts(profile: Profile, *, blocks: int, balance: str) -> list[int]:
    cost = profile.memory if balance == "memory" else profile.time
    return partition([cost] * blocks, segments=len(profile.segments))


def _prefixes(name: str) -> list[str]:
    """The containers of a submodule: "a.b.c" -> ["a", "a.b"]."""
    parts = name.split(".")
    return [".".join(parts[:i]) for i in range(1, len(parts))]


def _describe(node: fx.Node) -> str:
    if node.op == "placeholder":
        return f"the input {node.name!r}"
    if node.op == "call_module":
        return f"the output of submodule {node.target!r}"
    operation = getattr(node.target, "__name__", node.target)
    return f"the value {operation}({', '.join(map(str, node.args))})"


def _some(modules: dict[str, nn.Module], *, most: int = 12) -> str:
    names = [name for name in modules if name]
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")
