"""The graph of a model's forward pass, traced through the containers to be cut and no deeper.

Any other module is a single call in the graph, whatever it does inside.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from blocklocal.arguments import first_line, passes
from blocklocal.effects import Draws, State, ambient
from blocklocal.internals import has_hooks
from blocklocal.modes import Obstacle, Trace, both_modes
from blocklocal.recompute import is_recomputed
from blocklocal.tracer import ContainerTracer
from blocklocal.values import Arguments, Inputs, call, map_tensors, positional, prediction_of, tensors


def prediction(returned: Any) -> Any:
    """The prediction in what a model returns."""
    return returned if isinstance(returned, fx.Proxy) else prediction_of(returned, kind=fx.Proxy)


def trace(
    model: nn.Module,
    *,
    containers: frozenset[str],
    arguments: Arguments | None = None,
    returned: Callable[[Any], Any] = prediction,
) -> Trace:
    """Trace `model` through `containers` (qualified names), in training and in evaluation mode.

    arguments: of a call of the model, which every operation is run on, in evaluation mode as they are, in training mode
    with one sample more. returned: takes the value of the graph from what the model returns.

    ValueError: the forward pass cannot be traced, or the trace would do something else. This is so if a container does
    more than its class's forward pass, if it draws random numbers in Python, which tracing would freeze, if it enters a
    context or sets attributes, which tracing would lose, if the two modes call different functions, since a traced
    block could follow only one of them, or if it decides on what is in a tensor or on the size of the batch.
    """
    _check_traceable(model)
    outermost = sorted(name for name in containers if name.rpartition(".")[0] not in containers)
    where = " or ".join([type(model).__name__, *map(repr, outermost[:3])]) + " or others" * (len(outermost) > 3)
    modules = {name: model.get_submodule(name) for name in ("", *sorted(containers))}
    for name, module in modules.items():
        if found := obstacle(module):
            raise ValueError(f"{name!r} {found}: cut outside it")

    def record(given: Arguments | None, *, training: bool) -> ContainerTracer:
        return _record(model, modules, given, training=training, returned=returned, where=where)

    evaluated = record(None if arguments is None else arguments.copy(), training=False)
    longer = None if arguments is None else arguments.one_more()
    try:
        trained = record(longer, training=True)
    except Obstacle:
        if longer is None:
            raise
        assert arguments is not None
        trained = record(arguments.copy(), training=True)  # what is one longer beside the batch may not fit
    return both_modes(evaluated, trained, where=where)


def _record(
    model: nn.Module,
    modules: dict[str, nn.Module],
    arguments: Arguments | None,
    *,
    training: bool,
    returned: Callable[[Any], Any],
    where: str,
) -> ContainerTracer:
    """One forward pass, recorded. ValueError: it cannot be, or it does what a graph cannot."""
    with mode(model, training=False), ambient(enabled=training):
        for module in modules.values():
            module.training = training
        tracer = ContainerTracer(frozenset(modules) - {""}, arguments=arguments, returned=returned)
        states, draws, failure = [State(module) for module in modules.values()], Draws(), None
        try:
            tracer.record(model)
        except Exception as error:
            failure = error
        finally:
            changed = [(path, name) for path, state in zip(modules, states, strict=True) for name in state.restore()]
            drawn = draws.restore()
    if any(name.startswith("_tensor_constant") for _, name in changed):
        raise Obstacle(
            f"the forward pass of {where} makes a tensor that does not depend on its input: "
            "register it as a buffer, move it into a submodule, or cut outside",
            container=tracer.inside,
        )
    if changed:
        path, name = changed[0]
        raise Obstacle(
            f"the forward pass of {where} changes its attribute {name!r}, which a traced block would "
            "not: move this into a submodule, or cut outside",
            container=path,
        )
    if failure is not None:
        raise Obstacle(
            f"the forward pass of {where} cannot be traced ({first_line(failure)}): "
            "cut outside it, or pass the blocks as a list of modules",
            container=tracer.inside,
        ) from failure
    if drawn:
        raise Obstacle(
            f"the forward pass of {where} draws random numbers that a trace would freeze, such as which layers to "
            "skip: move the draw into a submodule, or cut outside",
            container="",
        )
    return tracer


def obstacle(module: nn.Module) -> str | None:
    """What a module does apart from its class's forward pass, which is all that a trace follows; None if nothing."""
    if isinstance(module, torch.jit.ScriptModule):
        return "is a ScriptModule, which has no Python code to trace"
    if is_recomputed(module):
        return "is recomputed as a whole (bll.recompute)"
    if "forward" in vars(module):
        return "has a forward pass of its own, set on the instance"
    if has_hooks(module):
        return "has hooks, and a module that is cut is never called"
    return None


def _check_traceable(model: nn.Module) -> None:
    if found := obstacle(model):
        raise ValueError(f"{type(model).__name__} {found}: cut outside it")


def deepest(model: nn.Module, *, arguments: Arguments | None = None) -> Trace:
    """The trace through all containers that can be traced through. ValueError: see `trace`."""
    _check_traceable(model)
    found = _containers(model, arguments=arguments)
    whole = {name: why for name, why in found.items() if why}
    containers = frozenset(found) - frozenset(whole)
    while True:
        try:
            return replace(trace(model, containers=containers, arguments=arguments), whole=whole)
        except Obstacle as error:
            name = error.container
            if not name:
                raise
            whole[name] = str(error)
            containers = frozenset(n for n in containers if n != name and not n.startswith(f"{name}."))


def expand(model: nn.Module, *, arguments: Arguments | None = None) -> frozenset[str]:
    """All containers of `model` that can be traced through; any other container stays whole.

    arguments: of a call of the model, from which those of its containers follow.
    """
    return frozenset(name for name, why in _containers(model, arguments=arguments).items() if not why)


def _containers(model: nn.Module, *, arguments: Arguments | None) -> dict[str, str]:
    """The containers of a model with an empty string, or why one cannot be traced through, without those inside it."""
    if arguments is None:
        trace(model, containers=frozenset())
    calls = {} if arguments is None else _calls(model, arguments)
    found: dict[str, str] = {}
    frontier = [name for name, _ in model.named_children()]
    while frontier:
        name = frontier.pop()
        module = model.get_submodule(name)
        if not isinstance(module, nn.ModuleList | nn.ModuleDict):
            if not _is_container(module) or (arguments is not None and name not in calls):
                continue
            try:
                trace(module, containers=frozenset(), arguments=calls.get(name), returned=_anything)
            except ValueError as error:
                found[name] = str(error)
                continue
            found[name] = ""
        frontier += [f"{name}.{child}" for child, _ in module.named_children()]
    return found


def few(model: nn.Module, example: Inputs) -> Inputs:
    """The first two samples of a batch, or all of them where the model does not take fewer.

    ValueError: the model does not take the batch.
    """
    batch = len(next(tensors(example)))
    if batch > 2:
        fewer = map_tensors(lambda t: t[:2].clone() if t.dim() and len(t) == batch else t, example)
        with suppress(ValueError):  # something else may be as long as the batch
            _try(model, fewer)
            return fewer
    _try(model, example)
    return example


def _try(model: nn.Module, x: Inputs) -> None:
    draws, states = Draws(), [State(module) for module in model.modules()]
    try:
        with mode(model, training=False), torch.no_grad(), passes(x, name="example", through="the model"):
            call(model, map_tensors(Tensor.clone, x))
    finally:
        draws.restore()
        for state in states:
            state.restore()


def _anything(returned: Any) -> Any:
    """What a graph can return, of all that a container may."""
    if isinstance(returned, fx.Proxy) or not isinstance(returned, Iterable):
        return returned
    parts = returned.values() if isinstance(returned, Mapping) else returned
    return [part for part in parts if isinstance(part, fx.Proxy)]


def _calls(model: nn.Module, arguments: Arguments) -> dict[str, Arguments]:
    """The arguments of each container that a pass of the model calls once."""
    found: dict[str, list[Arguments]] = {}

    def note(name: str) -> Callable[..., None]:
        def call(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            found.setdefault(name, []).append(Arguments(args, kwargs, positional(module, len(args))))

        return call

    handles = [
        module.register_forward_pre_hook(note(name), with_kwargs=True)
        for name, module in model.named_modules()
        if name and _is_container(module) and not isinstance(module, torch.jit.ScriptModule)
    ]
    draws = Draws()
    try:
        with mode(model, training=False), torch.no_grad():
            given = arguments.copy()
            model(*given.args, **given.kwargs)
    finally:
        draws.restore()
        for handle in handles:
            handle.remove()
    return {name: calls[0] for name, calls in found.items() if len(calls) == 1}


def crossing(graph: fx.Graph, node: fx.Node) -> list[fx.Node]:
    """The values computed up to and including `node` that are used after it, without parameters and buffers."""
    values, before = [], True
    positions = {other: i for i, other in enumerate(graph.nodes)}
    for other in graph.nodes:
        if before and other.op != "get_attr" and any(positions[user] > positions[node] for user in other.users):
            values.append(other)
        if other is node:
            before = False
    return values


def _is_container(module: nn.Module) -> bool:
    builtin = type(module).__module__.startswith("torch.nn") and not isinstance(module, nn.Sequential)
    return not builtin and any(True for _ in module.children())


@contextmanager
def mode(model: nn.Module, *, training: bool) -> Iterator[None]:
    """Put all modules in training or evaluation mode; afterwards each is in its own mode again."""
    flags = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in flags:
            module.training = training
        yield
    finally:
        for module, flag in flags:
            module.training = flag
