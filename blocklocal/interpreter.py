"""Runs the operations of a graph on an example as they are recorded, and knows what each of their values comes from."""

from __future__ import annotations

import copy
import operator
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, UntypedStorage, fx, nn
from torch.fx.immutable_collections import immutable_dict, immutable_list
from torch.fx.node import map_arg

from blocklocal.effects import Draws, devices
from blocklocal.internals import OperationMode, version_of
from blocklocal.values import tensors

ABOUT = {"dim", "size", "numel", "nelement", "ndimension", "stride", "is_floating_point", "is_complex", "is_contiguous"}
"""Methods of a tensor that tell something about it, and nothing of what is in it."""

ABOUT_FUNCTIONS = {getattr, len, torch.is_tensor, torch.is_floating_point, torch.is_complex, torch.numel}


class Interpreter:
    """Runs nodes of a graph of `root` one by one.

    values: what each node computes from the example. about: the nodes whose value is no tensor and depends on sizes,
    types and devices alone. data: those nodes and what is computed from them, the model's inputs and buffers alone,
    without parameters and random draws, so that any block can compute it again. writes: for a node, the storages that
    it writes into.
    """

    def __init__(self, root: nn.Module, inputs: Mapping[str, Tensor]) -> None:
        self.root, self.inputs = root, inputs
        self.values: dict[fx.Node, Any] = {}
        self.data: set[fx.Node] = set()
        self.about: set[fx.Node] = set()
        self.writes: dict[fx.Node, set[UntypedStorage]] = {}
        self.running = False

    def run(self, node: fx.Node) -> None:
        args, kwargs = (_plain(map_arg(part, self.values.__getitem__)) for part in (node.args, dict(node.kwargs)))
        given = list(tensors([args, kwargs]))
        versions = [version_of(tensor) for tensor in given]
        draws = Draws()
        with self._alone():
            value = self._compute(node, args, kwargs)
        drawn = draws.restore()
        self.values[node] = value
        changed = [tensor for tensor, version in zip(given, versions, strict=True) if version_of(tensor) != version]
        if changed:
            self.writes[node] = {storage_of(tensor) for tensor in changed}
        if not changed and self._is_about(node):
            self.about.add(node)
        if node in self.about or (not drawn and self._is_data(node)):
            self.data.add(node)
        elif changed:  # what was data now holds something else
            self.data -= {other for other in self.data if self.storages(other) & self.writes[node]}

    def read_by(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> set[UntypedStorage]:
        """The storages whose values the operations of a module without parameters are given."""
        draws, reads = Draws(), Reads()
        with self._alone(), reads:
            copy.deepcopy(module)(*args, **kwargs)
        draws.restore()
        return reads.storages

    def storages(self, node: fx.Node) -> set[UntypedStorage]:
        return {storage_of(tensor) for tensor in tensors(self.values[node])}

    def _compute(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        match node.op:
            case "placeholder":
                return self.inputs[str(node.target)]
            case "get_attr":
                return operator.attrgetter(str(node.target))(self.root)
            case "call_function":
                assert callable(node.target)
                return node.target(*args, **kwargs)
            case "call_method":
                return getattr(args[0], str(node.target))(*args[1:], **kwargs)
            case _:
                module = self.root.get_submodule(str(node.target))
                if not _has_parameters(module):  # cheap to copy, and its state stays as it is
                    module = copy.deepcopy(module).train(self.root.training)
                return module(*args, **kwargs)

    def _is_data(self, node: fx.Node) -> bool:
        if node.op == "get_attr":
            return not isinstance(self.values[node], nn.Parameter)
        if node.op == "call_module" and _has_parameters(self.root.get_submodule(str(node.target))):
            return False
        return all(one in self.data for one in node.all_input_nodes)

    def _is_about(self, node: fx.Node) -> bool:
        value = self.values[node]
        if node.target is outline_of:
            return True
        if value is None or any(True for _ in tensors(value)):
            return value is None
        if any(True for one in node.all_input_nodes for _ in tensors(self.values[one])):
            return node.target in (ABOUT if node.op == "call_method" else ABOUT_FUNCTIONS)
        return all(one in self.about for one in node.all_input_nodes)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """The context in which blocks run: with gradients, without autocast."""
        self.running = True
        try:
            with ExitStack() as contexts:
                contexts.enter_context(torch.enable_grad())
                for device in devices():
                    contexts.enter_context(torch.autocast(device, enabled=False))
                yield
        finally:
            self.running = False


class Reads(OperationMode):
    """Sees which storages operations are given, while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: set[UntypedStorage] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.storages |= {storage_of(tensor) for tensor in tensors([args, kwargs or {}])}
        return func(*args, **(kwargs or {}))


def outline(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of one element's memory, whatever its shape, whose values nobody reads."""
    return torch.empty((), dtype=dtype, device=device).expand(tuple(shape))


def outline_of(tensor: Tensor) -> Tensor:
    """The outline of a tensor."""
    return outline(tensor.shape, tensor.dtype, tensor.device)


def storage_of(tensor: Tensor) -> UntypedStorage:
    """The memory of a tensor, one object for all its views, not its id: that of freed memory may be another's later."""
    return tensor.untyped_storage()


def _plain(value: Any) -> Any:
    """A value with lists and dicts that can be changed, which those of a graph cannot."""
    if type(value) in (immutable_list, list, tuple):
        return (tuple if type(value) is tuple else list)(map(_plain, value))
    if type(value) in (immutable_dict, dict):
        return {name: _plain(part) for name, part in value.items()}
    return value


def _has_parameters(module: nn.Module) -> bool:
    return any(True for _ in module.parameters())
