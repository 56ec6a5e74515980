"""Records a forward pass with torch.fx, through the containers to be cut and no deeper.

With an example every operation runs as it is recorded. Python may then ask for sizes, types and devices, as in `assert
x.dim() == 4` or `int(h.shape[2] ** 0.5)`: the answer for the example goes into the graph, with a check that later
batches give the same. What is in a tensor decides nothing.
"""

from __future__ import annotations

import inspect
import operator
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg

from blocklocal.decisions import decided, describe
from blocklocal.effects import context
from blocklocal.interpreter import Interpreter, outline_of
from blocklocal.values import Arguments, features, is_real

FACTORIES = (
    *("arange", "empty", "eye", "full", "linspace", "logspace", "normal", "ones", "tensor", "zeros"),
    *("rand", "randint", "randn", "randperm"),
)
TYPES = ("finfo", "iinfo")


class ContainerTracer(fx.Tracer):
    """Traces through the root and the named containers; every other module is a leaf.

    arguments: of the root's forward pass, an example; without them every operation is only recorded. returned: takes
    what the graph is to return from what the root returns.
    """

    def __init__(
        self, containers: frozenset[str], *, arguments: Arguments | None, returned: Callable[[Any], Any]
    ) -> None:
        super().__init__()
        self.containers, self.arguments, self.returned = containers, arguments, returned
        self.outputs: dict[str, list[fx.Node]] = {}
        self.owners: dict[fx.Node, str] = {}
        """The container whose forward pass made each node."""
        self.known: Interpreter | None = None
        self.context = context()
        self.proxy_buffer_attributes = arguments is not None
        self._inside = [""]
        self._recording = False
        self._patches: list[Any] = []
        self._decided: set[tuple[fx.Node, Any]] = set()

    def record(self, root: nn.Module) -> fx.Graph:
        if self.arguments is not None:
            torch.compiler.disable(lambda: None)  # imports the compiler, which must not meet stand-ins for functions
            self.known = Interpreter(root, self.arguments.tensors())
        with self._recorded(root):
            return self.trace(root)

    def create_args_for_root(self, root_fn, is_module, concrete_args=None):
        """The inputs of the graph: the tensors of the example, or the arguments of the forward pass without a default.
        The others keep their value."""
        if self.arguments is not None:
            args, kwargs = self.arguments.map(lambda name: self.create_proxy("placeholder", name, (), {}))
        else:
            variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
            _, *parameters = inspect.signature(root_fn).parameters.values()
            names = [p.name for p in parameters if p.default is p.empty and p.kind not in variadic]
            args, kwargs = tuple(self.create_proxy("placeholder", name, (), {}) for name in names), {}

        return lambda root: self.returned(root_fn(root, *args, **kwargs)), [self.root]

    def create_node(self, kind, target, args, kwargs, name=None, type_expr=None):
        """Create a node. It will run in its caller's context: a context that the forward pass enters is lost."""
        if context() != self.context:
            raise ValueError(
                "it enters a context, such as torch.no_grad() or torch.autocast(), which a trace would lose"
            )
        node = super().create_node(kind, target, args, kwargs, name, type_expr)
        self.owners[node] = self._inside[-1]
        if self.known is not None and kind != "output":
            with self._unpatched():
                self.known.run(node)
        return node

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return fx.Proxy(node, self) if self.known is None else Value(node, self)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        return attr_val if self._runs else super().getattr(attr, attr_val, parameter_proxy_cache)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return module_qualified_name not in self.containers

    def call_module(self, m, forward, args, kwargs):
        if self._runs:
            return forward(*args, **kwargs)
        try:
            name = self.path_of_module(m)
        except NameError:  # a module made on the fly
            return forward(*args, **kwargs)
        if name not in self.containers:
            args, kwargs = self._outlined(m, args, kwargs)
            output = super().call_module(m, forward, args, kwargs)
        else:
            self._inside.append(name)
            output = super().call_module(m, forward, args, kwargs)
            self._inside.pop()  # an exception leaves it where it was raised
        if (node := self._features(output)) is not None:
            self.outputs.setdefault(name, []).append(node)
        return output

    def to_bool(self, obj: fx.Proxy) -> bool:
        return super().to_bool(obj) if self.known is None else self.decide(obj, bool)

    def decide(self, value: fx.Proxy, kind: Callable[[Any], Any]) -> Any:
        """kind(value) for the example, after recording a check that it is the same for other batches.

        ValueError: it depends on what is in a tensor.
        """
        assert self.known is not None
        node = value.node
        if node not in self.known.about:
            raise ValueError(f"it asks for the value of {describe(node)}, which differs from batch to batch")
        answer = kind(self.known.values[node])
        if (node, kind) not in self._decided:
            self._decided.add((node, kind))
            self.create_node("call_function", decided, (node, answer, describe(node)), {})
        return answer

    @property
    def inside(self) -> str:
        """The container whose forward pass is being recorded."""
        return self._inside[-1]

    def _outlined(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """The arguments of a leaf with outlines in the place of features of which it reads no value, as in a module
        that makes rotary embeddings for the type and the device of the features: its result is data."""
        if self.known is None or any(True for _ in module.parameters()):
            return args, kwargs
        proxies = [one for one in (*args, *kwargs.values()) if isinstance(one, Value) and one.is_tensor]
        features = {one for one in proxies if one.node not in self.known.data}
        if not features or len(features) == len(proxies):
            return args, kwargs
        given: Any = map_arg(self.create_arg((args, dict(kwargs))), self.known.values.__getitem__)
        with self._unpatched():
            read = self.known.read_by(module, given[0], given[1])
        unread = {one.node for one in features if not self.known.storages(one.node) & read}

        def outlined(one: Any) -> Any:
            if isinstance(one, Value) and one.node in unread:
                return self.create_proxy("call_function", outline_of, (one,), {})
            return one

        return tuple(map(outlined, args)), {name: outlined(one) for name, one in kwargs.items()}

    @property
    def _runs(self) -> bool:
        return self.known is not None and self.known.running

    def _features(self, output: Any) -> fx.Node | None:
        """The node of what a module returns, or of the features in it."""
        if isinstance(output, fx.Proxy):
            return output.node
        if self.known is None:
            return None
        found = features(output, accept=self._is_real)
        return None if found is None else found[0].node

    def _is_real(self, part: Any) -> bool:
        if not isinstance(part, fx.Proxy):
            return False
        assert self.known is not None
        return is_real(self.known.values[part.node])

    @contextmanager
    def _recorded(self, root: nn.Module) -> Iterator[None]:
        """Record calls of functions that torch.fx does not see: those that make tensors of numbers, and len."""
        thread = threading.get_ident()

        def recorded(function: Callable[..., Any], *, always: bool) -> Callable[..., Any]:
            def record(*args: Any, **kwargs: Any) -> Any:
                asked = always or any(isinstance(one, fx.Proxy) for one in args)
                if not self._recording or self._runs or threading.get_ident() != thread or not asked:
                    return function(*args, **kwargs)
                return self.create_proxy("call_function", function, args, kwargs)

            return record

        with ExitStack() as patches:
            self._patches = [
                patch.object(torch, name, recorded(getattr(torch, name), always=name in FACTORIES))
                for name in (*FACTORIES, *TYPES)
            ]
            for one in self._patches:
                one.start()
                patches.callback(one.stop)
            patches.callback(setattr, self, "_recording", False)  # what has kept such a function calls torch's again
            self._recording = True
            if self.known is not None:
                count = recorded(len, always=False)
                for scope in _scopes([root, *map(root.get_submodule, sorted(self.containers))]):
                    patches.enter_context(patch.dict(scope, {"len": scope.get("len", count)}))
            yield

    @contextmanager
    def _unpatched(self) -> Iterator[None]:
        """With torch's own functions, as for operations that compile or import what reads them."""
        for one in self._patches:
            one.stop()
        try:
            yield
        finally:
            for one in self._patches:
                one.start()


class Value(fx.Proxy):
    """A recorded value that is known for the example."""

    tracer: ContainerTracer

    def __getattr__(self, name: str) -> Any:
        assert self.tracer.known is not None
        if callable(getattr(self.tracer.known.values[self.node], name)):
            return super().__getattr__(name)  # a method, recorded when it is called
        return self.tracer.create_proxy("call_function", getattr, (self, name), {})

    @property
    def is_tensor(self) -> bool:
        known = self.tracer.known
        return known is not None and isinstance(known.values[self.node], Tensor)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise ValueError(f"it asks for the value of {describe(self.node)}, which differs from batch to batch")

    def __setitem__(self, index: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, index, value), {})

    def __iter__(self) -> Iterator[Any]:
        assert self.tracer.known is not None
        value = self.tracer.known.values[self.node]
        if isinstance(value, Mapping):
            return iter(value)
        return iter([operator.getitem(self, i) for i in range(len(self))])  # pyright: ignore[reportArgumentType, reportCallIssue]

    def __len__(self) -> int:
        return self.tracer.decide(self.tracer.create_proxy("call_function", len, (self,), {}), int)

    def __int__(self) -> int:
        return self.tracer.decide(self, int)

    def __float__(self) -> float:
        return self.tracer.decide(self, float)


def _scopes(modules: list[nn.Module]) -> Iterator[dict[str, Any]]:
    """The global names of the forward passes of these modules, but for those of torch."""
    functions = [inspect.unwrap(type(module).forward) for module in modules]
    found = {id(scope): scope for f in functions if not f.__module__.startswith("torch.") for scope in [f.__globals__]}
    yield from found.values()
