"""The graph of a model's forward pass, traced through the containers to be cut and no deeper.

Any other module is a single call in the graph, whatever it does inside.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import fx, nn

from blocklocal.arguments import first_line
from blocklocal.effects import Draws, State, ambient, context
from blocklocal.internals import has_hooks
from blocklocal.recompute import is_recomputed


@dataclass(frozen=True)
class Trace:
    """A graph and, for each submodule that it calls, the nodes that hold the submodule's output, one per call."""

    graph: fx.Graph
    outputs: dict[str, list[fx.Node]]


class ContainerTracer(fx.Tracer):
    """Traces through the root and the named containers; every other module is a leaf."""

    def __init__(self, containers: frozenset[str]) -> None:
        super().__init__()
        self.containers = containers
        self.outputs: dict[str, list[fx.Node]] = {}
        self.context = context()

    def create_args_for_root(self, root_fn, is_module, concrete_args=None):
        """The inputs of the graph: arguments of the forward pass without a default. The others keep their default."""
        variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        _, *parameters = inspect.signature(root_fn).parameters.values()
        names = [p.name for p in parameters if p.default is p.empty and p.kind not in variadic]
        return root_fn, [self.root, *(self.create_proxy("placeholder", name, (), {}) for name in names)]

    def create_node(self, *args, **kwargs):
        """Create a node. It will run in its caller's context: a context that the forward pass enters is lost."""
        if context() != self.context:
            raise ValueError(
                "it enters a context, such as torch.no_grad() or torch.autocast(), which a trace would lose"
            )
        return super().create_node(*args, **kwargs)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return module_qualified_name not in self.containers

    def call_module(self, m, forward, args, kwargs):
        output = super().call_module(m, forward, args, kwargs)
        if isinstance(output, fx.Proxy):
            self.outputs.setdefault(self.path_of_module(m), []).append(output.node)
        return output


def trace(model: nn.Module, *, containers: frozenset[str]) -> Trace:
    """Trace `model` through `containers` (qualified names), in training and in evaluation mode.

    ValueError: the forward pass cannot be traced, or the trace would do something else. This is so if a container does
    more than its class's forward pass, if it creates tensors or draws random numbers, which tracing would freeze, if it
    enters a context or sets attributes, which tracing would lose, or if the two modes call different functions, since a
    traced block could follow only one of them.
    """
    if found := obstacle(model):
        raise ValueError(f"{type(model).__name__} {found}: cut outside it")
    where = " or ".join([type(model).__name__, *map(repr, sorted(containers))])
    modules = {name: model.get_submodule(name) for name in ("", *sorted(containers))}
    for name, module in modules.items():
        if found := obstacle(module):
            raise ValueError(f"{name!r} {found}: cut outside it")
    traces = {}
    for training in (False, True):
        with mode(model, training=training), ambient(enabled=training):
            tracer = ContainerTracer(containers)
            states, draws = [State(module) for module in modules.values()], Draws()
            try:
                graph = tracer.trace(model)
            except Exception as error:
                raise ValueError(
                    f"the forward pass of {where} cannot be traced ({first_line(error)}): "
                    "cut outside it, or pass the blocks as a list of modules"
                ) from error
            finally:
                changed = [name for state in states for name in state.restore()]
                drawn = draws.restore()
        if any(name.startswith("_tensor_constant") for name in changed):
            raise ValueError(
                f"the forward pass of {where} makes a tensor that does not depend on its input: "
                "register it as a buffer, move it into a submodule, or cut outside"
            )
        if changed:
            raise ValueError(
                f"the forward pass of {where} changes its attribute {changed[0]!r}, which a traced block would "
                "not: move this into a submodule, or cut outside"
            )
        if drawn:
            raise ValueError(
                f"the forward pass of {where} draws random numbers that a trace would freeze, such as which layers to "
                "skip: move the draw into a submodule, or cut outside"
            )
        traces[training] = Trace(graph, tracer.outputs)
    if str(traces[True].graph) != str(traces[False].graph):
        raise ValueError(
            f"the forward pass of {where} differs between training and evaluation mode: "
            "move what depends on self.training into a submodule of its own, such as nn.Dropout, or cut outside it"
        )
    return traces[True]


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


def expand(model: nn.Module) -> frozenset[str]:
    """All containers of `model` that can be traced through; any other container stays whole."""
    trace(model, containers=frozenset())
    containers: set[str] = set()
    frontier = [name for name, _ in model.named_children()]
    while frontier:
        name = frontier.pop()
        module = model.get_submodule(name)
        if not isinstance(module, nn.ModuleList | nn.ModuleDict):
            if not _is_container(module):
                continue
            try:
                trace(module, containers=frozenset())
            except ValueError:
                continue
            containers.add(name)
        frontier += [f"{name}.{child}" for child, _ in module.named_children()]
    return frozenset(containers)


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
