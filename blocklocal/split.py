"""Cut a model into a chain of blocks: one value, and nothing else, crosses each border."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Literal

from torch import fx, nn

from blocklocal.arguments import module_of, require, require_choice, require_whole
from blocklocal.balance import BorderLoss, measure, starts
from blocklocal.block import Block
from blocklocal.candidates import Places, changing, describe
from blocklocal.graph import deepest, few, obstacle, trace
from blocklocal.modes import Obstacle, Trace
from blocklocal.segments import bypassing, cut_at, follows, has_features, place_of
from blocklocal.shape_probe import check_example
from blocklocal.values import Arguments, Inputs, arguments_of, check_inputs, tensors


def split(
    model: nn.Module | Sequence[nn.Module],
    *,
    at: Sequence[str] | None = None,
    blocks: int | None = None,
    example: Inputs | None = None,
    balance: Literal["time", "memory"] = "memory",
    border: BorderLoss | None = None,
) -> nn.Sequential:
    """Cut `model` into blocks whose composition is the model, with the model's own parameters, buffers and names.

    at: submodules (qualified names) to put a border after. blocks: number of blocks, cut such that the slowest is as
    fast ("time") or the largest as small ("memory") as possible, measured on the batch `example`; the cost of the local
    losses is included if `border` makes them. With neither, a list of modules or an nn.Sequential is a chain as it is.
    example: a batch of the model's input: a tensor, or a tuple or dict of its inputs. It shows what a forward pass does
    that depends on sizes and types, and what each block needs of the inputs beside the features, its side inputs.

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
    example: Inputs | None,
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
        check_inputs(example, name="example")
    if at is not None:
        return _cut(model, at=at, example=example)
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
    if any(tensor.is_meta for tensor in (*tensors(example), *model.parameters(), *model.buffers())):
        raise ValueError(f"blocks={blocks} measures the model, and nothing runs on the meta device: pass at= or a list")
    places = Places(model, example=example)
    names = places.useful()
    if blocks > len(names) + 1:
        raise ValueError(
            f"blocks={blocks}: {type(model).__name__} can be cut at {len(names)} places only, "
            f"so {len(names) + 1} blocks at most{places.hindrance()}"
        )
    chain = [block for block in cut(model, at=names, example=example) if isinstance(block, Block)]
    given = arguments_of(model, example).tensors()
    first, *_ = chain[0].inputs
    sides = [[given[name] for name in block.inputs[1:]] for block in chain]
    profile = measure(chain, given[first], sides=sides, border=border)
    at = [names[start - 1] for start in starts(profile, blocks=blocks, balance=balance)]
    return _cut(model, at=at, example=example)


def cut(model: nn.Module, *, at: Sequence[str], example: Inputs | None = None) -> nn.Sequential:
    """Cut `model` after each of the submodules `at`."""
    return _cut(model, at=at, example=example)[0]


def _cut(model: nn.Module, *, at: Sequence[str], example: Inputs | None) -> tuple[nn.Sequential, list[str]]:
    """The chain, and the submodules in the order of the forward pass."""
    if example is not None:
        check_example(model, example)
    modules = dict(model.named_modules())
    for name in at:
        if name not in modules or not name:
            raise ValueError(f"at={name!r}: {type(model).__name__} has no such submodule; it has {_some(modules)}")
    containers = {prefix for name in at for prefix in _prefixes(name)}
    arguments = None if example is None else arguments_of(model, few(model, example))
    traced = _traced(model, frozenset(containers), arguments)
    inputs = [node.name for node in traced.graph.nodes if node.op == "placeholder"]
    if arguments is None and len(inputs) != 1:
        raise ValueError(
            f"{type(model).__name__} takes {len(inputs)} inputs ({', '.join(inputs)}): pass example=, a batch of them"
        )
    borders = _borders(traced, at=at)
    return _checked(nn.Sequential(*cut_at(model, traced, list(borders)))), list(borders.values())


def _traced(model: nn.Module, containers: frozenset[str], arguments: Arguments | None) -> Trace:
    """The trace through these containers, or through all where they are not enough: a module that is not traced may
    return numbers of which nothing is known."""
    try:
        return trace(model, containers=containers, arguments=arguments)
    except Obstacle as error:
        if arguments is None:
            raise
        with suppress(Obstacle):
            return deepest(model, arguments=arguments)
        raise error


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
        node = place_of(traced, calls[0])
        if node in nodes:
            raise ValueError(f"at={name!r}: the same border as {nodes[node]!r}")
        if not has_features(traced, node):
            raise ValueError(f"at={name!r}: it returns no tensor of features, which a border needs")
        if beside := bypassing(traced, node):
            raise ValueError(
                f"at={name!r}: {', '.join(map(describe, beside))} bypasses the border, and only the output of "
                f"{name!r} may cross it; cut where the model is a chain"
            )
        if not follows(traced, node):
            raise ValueError(f"at={name!r}: no computation follows this submodule, so there would be no block after it")
        nodes[node] = name
    return {node: nodes[node] for node in sorted(nodes, key=order.__getitem__)}


def _checked(chain: nn.Sequential) -> nn.Sequential:
    """Return the chain, after checking that nothing that a step changes is on both sides of a border."""
    blocks = list(chain)
    for k, block in enumerate(blocks):
        names = changing(block)
        for j, other in enumerate(blocks[:k]):
            for part, name in changing(other).items():
                if part in names:
                    kind = "parameter" if isinstance(part, nn.Parameter) else "running statistics"
                    raise ValueError(
                        f"{kind} {name!r} of block {j} is also {names[part]!r} of block {k}: "
                        "no border may separate two uses of it"
                    )
    return chain


def _prefixes(name: str) -> list[str]:
    """The containers of a submodule: "a.b.c" -> ["a", "a.b"]."""
    parts = name.split(".")
    return [".".join(parts[:i]) for i in range(1, len(parts))]


def _some(modules: dict[str, nn.Module], *, most: int = 12) -> str:
    names = [name for name in modules if name]
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")
