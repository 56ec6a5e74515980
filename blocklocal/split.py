"""Cut a model into a chain of blocks: one value, and nothing else, crosses each border."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor, fx, nn

from blocklocal.arguments import module_of, require, require_choice, require_tensor, require_whole
from blocklocal.balance import BorderLoss, measure, starts
from blocklocal.graph import Trace, crossing, expand, obstacle, trace
from blocklocal.outline import stand_ins
from blocklocal.recompute import NORMS


def split(
    model: nn.Module | Sequence[nn.Module],
    *,
    at: Sequence[str] | None = None,
    blocks: int | None = None,
    example: Tensor | None = None,
    balance: Literal["time", "memory"] = "memory",
    border: BorderLoss | None = None,
) -> nn.Sequential:
    """Cut `model` into blocks whose composition is the model, with the model's own parameters, buffers and names.

    at: submodules (qualified names) to put a border after. blocks: number of blocks, cut such that the slowest is as
    fast ("time") or the largest as small ("memory") as possible, measured on the batch `example`; the cost of the local
    losses is included if `border` makes them. With neither, a list of modules or an nn.Sequential is a chain as it is.

    ValueError: a submodule that does not exist or is not called exactly once, a value that bypasses a border,
    parameters on both sides of a border, too many blocks for the possible cuts.

    >>> chain = split(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), at=["1"])
    >>> [name for name, _ in chain[1].named_parameters()]
    ['2.weight', '2.bias']
    """
    return divide(model, at=at, blocks=blocks, example=example, balance=balance, border=border)[0]


def divide(
    model: nn.Module | Sequence[nn.Module],
    *,
    at: Sequence[str] | None,
    blocks: int | None,
    example: Tensor | None,
    balance: Literal["time", "memory"],
    border: BorderLoss | None,
) -> tuple[nn.Sequential, list[str]]:
    """What `split` returns, and the submodules after which its borders stand, in the order of the forward pass."""
    model = module_of(model)
    if at is not None and blocks is not None:
        raise ValueError("at= and blocks= both say where to cut: pass one of them")
    if isinstance(at, str):
        raise ValueError(f"at={at!r}: pass a list of submodules, at=[{at!r}]")
    if at is not None:
        require(at, Sequence, name="at", needed="pass a list of names of submodules")
        for i, name in enumerate(at):
            require(name, str, name=f"at[{i}]", needed="pass the name of a submodule")
    require_choice(balance, ("time", "memory"), name="balance")
    if example is not None:
        require_tensor(example, name="example")
    if at is not None:
        return _cut(model, at=at)
    if blocks is None:
        if isinstance(model, nn.Sequential) and type(model).forward is nn.Sequential.forward:
            if found := obstacle(model):
                raise ValueError(f"{type(model).__name__} {found}: pass a list of modules")
            return _checked(model), [name for name, _ in model.named_children()][:-1]
        raise ValueError(f"where to cut {type(model).__name__}? Pass at=[submodules] or blocks=K")
    blocks = require_whole(blocks, name="blocks", least=1)
    if blocks == 1:
        return nn.Sequential(model), []
    if example is None:
        raise ValueError("blocks=K measures the model: pass example=, a batch of its input")
    if any(tensor.is_meta for tensor in (example, *model.parameters(), *model.buffers())):
        raise ValueError(f"blocks={blocks} measures the model, and nothing runs on the meta device: pass at= or a list")
    places = candidates(model)
    if blocks > len(places) + 1:
        raise ValueError(
            f"blocks={blocks}: {type(model).__name__} can be cut at {len(places)} places only, "
            f"so {len(places) + 1} blocks at most"
        )
    profile = measure(list(cut(model, at=places)), example, border=border)
    return _cut(model, at=[places[start - 1] for start in starts(profile, blocks=blocks, balance=balance)])


def candidates(model: nn.Module) -> list[str]:
    """All submodules after which the model can be cut into blocks that learn, in the order of the forward pass."""
    traced, names = _places(model)
    return _useful(model, traced, names)


def places(model: nn.Module) -> list[str]:
    """All submodules whose output alone is read by what follows, in the same order, even layers without weights."""
    return _places(model)[1]


def _places(model: nn.Module) -> tuple[Trace, list[str]]:
    traced = trace(model, containers=expand(model))
    order = {node: i for i, node in enumerate(traced.graph.nodes)}
    final = next(iter(reversed(traced.graph.nodes))).args[0]
    names: dict[fx.Node, str] = {}
    for name, nodes in traced.outputs.items():
        node = nodes[0]
        if len(nodes) > 1 or node is final or crossing(traced.graph, node) != [node]:
            continue
        names[node] = min(name, names.get(node, name), key=len)
    return traced, [names[node] for node in sorted(names, key=order.__getitem__)]


def cut(model: nn.Module, *, at: Sequence[str]) -> nn.Sequential:
    """Cut `model` after each of the submodules `at`."""
    return _cut(model, at=at)[0]


def _cut(model: nn.Module, *, at: Sequence[str]) -> tuple[nn.Sequential, list[str]]:
    """The chain, and the submodules in the order of the forward pass."""
    modules = dict(model.named_modules())
    for name in at:
        if name not in modules or not name:
            raise ValueError(f"at={name!r}: {type(model).__name__} has no such submodule; it has {_some(modules)}")
    containers = {prefix for name in at for prefix in _prefixes(name)}
    traced = trace(model, containers=frozenset(containers))
    inputs = [node.name for node in traced.graph.nodes if node.op == "placeholder"]
    if len(inputs) != 1:
        raise ValueError(f"{type(model).__name__} takes {len(inputs)} inputs ({', '.join(inputs)}): a chain has one")
    borders = _borders(traced, at=at)
    return _checked(_segments(model, traced, borders=list(borders))), list(borders.values())


def _borders(traced: Trace, *, at: Sequence[str]) -> dict[fx.Node, str]:
    """The nodes whose values cross the borders, with their submodules, in the order of the forward pass."""
    order = {node: i for i, node in enumerate(traced.graph.nodes)}
    nodes: dict[fx.Node, str] = {}
    for name in at:
        calls = traced.outputs.get(name, [])
        if len(calls) != 1:
            raise ValueError(
                f"at={name!r}: a border needs a submodule called once, but this one is called {len(calls)} times"
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
            raise ValueError(f"at={name!r}: no computation follows this submodule, so there would be no block after it")
        nodes[node] = name
    return {node: nodes[node] for node in sorted(nodes, key=order.__getitem__)}


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
    saved = model.state_dict().keys()
    for block in blocks:
        for path, stand_in in stand_ins(model, block):
            for name, buffer in list(stand_in.named_buffers(recurse=False)):
                stand_in.register_buffer(name, buffer, persistent=f"{path}.{name}".removeprefix(".") in saved)
    return nn.Sequential(*blocks)


def _checked(chain: nn.Sequential) -> nn.Sequential:
    """Return the chain, after checking that nothing that a step changes is on both sides of a border."""
    blocks = list(chain)
    for k, block in enumerate(blocks):
        names = _changing(block)
        for j, other in enumerate(blocks[:k]):
            for part, name in _changing(other).items():
                if part in names:
                    kind = "parameter" if isinstance(part, nn.Parameter) else "running statistics"
                    raise ValueError(
                        f"{kind} {name!r} of block {j} is also {names[part]!r} of block {k}: "
                        "no border may separate two uses of it"
                    )
    return chain


def _changing(block: nn.Module) -> dict[nn.Parameter | nn.Module, str]:
    """The parameters and the layers with running statistics of a block, with their names."""
    norms = {
        norm: name or type(norm).__name__
        for name, norm in block.named_modules()
        if isinstance(norm, NORMS) and norm.track_running_stats
    }
    return {**{parameter: name for name, parameter in block.named_parameters()}, **norms}


def _useful(model: nn.Module, traced: Trace, names: list[str]) -> list[str]:
    """The cuts directly before a weight matrix or kernel that no parameter or running statistics bridge.

    Layers without one (normalisation, activation, dropout, pooling) belong to the block of the layer before them.
    """
    chain = _segments(model, traced, borders=[traced.outputs[name][0] for name in names])
    owners: dict[nn.Parameter | nn.Module, list[int]] = {}
    for k, segment in enumerate(chain):
        for part in _changing(segment):
            owners.setdefault(part, []).append(k)
    spans = [(used[0], used[-1]) for used in owners.values()]
    weighs = [any(parameter.dim() > 1 for parameter in segment.parameters()) for segment in chain]
    return [
        name
        for k, name in enumerate(names)
        if weighs[k + 1] and any(weighs[: k + 1]) and not any(first <= k < last for first, last in spans)
    ]


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
