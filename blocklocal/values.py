"""Inputs and outputs of models and their submodules: a tensor, a tuple, a dict, an output object."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from blocklocal.arguments import describe

Inputs = Tensor | tuple[Any, ...] | Mapping[str, Any]
"""What a model takes: model(x) of a tensor, model(*x) of a tuple, model(**x) of a dict."""


@dataclass(frozen=True)
class Arguments:
    """Those of a call, module(*args, **kwargs); names: of the parameters that args stand for."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    names: tuple[str, ...]

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name; one inside a tuple, list or dict has the name of its place there at the end."""
        found: dict[str, Tensor] = {}
        self._walk(lambda name, tensor: found.setdefault(name, tensor))
        return found

    def constants(self) -> dict[str, Any]:
        """All else by name."""
        found: dict[str, Any] = {}
        self._walk(lambda name, tensor: None, constant=lambda name, value: found.setdefault(name, value))
        return found

    def map(self, function: Callable[[str], Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The same arguments with function(name) in the place of each tensor."""
        return self._walk(lambda name, tensor: function(name))

    def copy(self) -> Arguments:
        """The same with copies of the tensors, which a forward pass may write into."""
        return self._replaced(Tensor.clone)

    def zeros(self, *, device: torch.device | str) -> Arguments:
        """The same with zeros for the tensors, on a device; without memory where there is one zero for them all."""
        return self._replaced(lambda t: torch.zeros((), dtype=t.dtype, device=device).expand(t.shape))

    def one_more(self) -> Arguments:
        """The same with the first sample once more at the end of the batch, which is the first tensor's."""
        batch = next((len(t) if t.dim() else 0 for t in self.tensors().values()), 0)
        return self._replaced(lambda t: torch.cat([t, t[:1]]) if t.dim() and len(t) == batch else t.clone())

    def _replaced(self, function: Callable[[Tensor], Tensor]) -> Arguments:
        args, kwargs = self._walk(lambda name, tensor: function(tensor))
        return Arguments(args, kwargs, self.names)

    def _walk(
        self, function: Callable[[str, Tensor], Any], *, constant: Callable[[str, Any], Any] = lambda name, value: value
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        args = tuple(_walk(name, value, function, constant) for name, value in zip(self.names, self.args, strict=True))
        return args, {name: _walk(name, value, function, constant) for name, value in self.kwargs.items()}


def _walk(name: str, value: Any, function: Callable[[str, Tensor], Any], constant: Callable[[str, Any], Any]) -> Any:
    if isinstance(value, Tensor):
        return function(name, value)
    if isinstance(value, Mapping):
        return {key: _walk(f"{name}_{key}", part, function, constant) for key, part in value.items()}
    if type(value) in (tuple, list):
        return type(value)(_walk(f"{name}_{i}", part, function, constant) for i, part in enumerate(value))
    return constant(name, value)


def positional(module: nn.Module, count: int) -> tuple[str, ...]:
    """The names of the first parameters of a module's forward pass; those of *args are numbered."""
    names: list[str] = []
    for parameter in inspect.signature(module.forward).parameters.values():
        if parameter.kind is parameter.VAR_POSITIONAL:
            names += [f"{parameter.name}_{i}" for i in range(count - len(names))]
        elif parameter.kind is not parameter.VAR_KEYWORD:
            names.append(parameter.name)
    return tuple(names[:count])


def arguments_of(model: nn.Module, x: Inputs) -> Arguments:
    """Those of the call of a model on x."""
    if isinstance(x, Mapping):
        return Arguments((), x, ())
    args = x if isinstance(x, tuple) else (x,)
    return Arguments(args, {}, positional(model, len(args)))


def call(model: nn.Module, x: Inputs) -> object:
    if isinstance(x, Mapping):
        return model(**x)
    return model(*x) if isinstance(x, tuple) else model(x)


def tensors(value: object) -> Iterator[Tensor]:
    """Those in a value, which may stand in tuples, lists and dicts."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from tensors(part)


def check_inputs(x: object, *, name: str) -> None:
    """TypeError, ValueError: what no model takes, or a batch without a sample."""
    if not isinstance(x, Tensor | tuple | Mapping):
        raise TypeError(f"{name} is {describe(x)}: pass the model's input, a tensor, or a tuple or dict of its inputs")
    found = list(tensors(x))
    if not found:
        raise ValueError(f"{name} holds no tensor: pass the model's input, a tensor, or a tuple or dict of its inputs")
    for tensor in found:
        if tensor.is_nested:
            raise ValueError(f"{name} holds {describe(tensor)}, but a tensor of a single shape is needed: pad it")
        if not tensor.numel():
            holds = "has" if isinstance(x, Tensor) else "holds a tensor of"
            raise ValueError(f"{name} {holds} shape {tuple(tensor.shape)}: an empty batch has no loss, leave it out")


def map_tensors(function: Callable[[Tensor], Tensor], x: Any) -> Any:
    """x with function(tensor) in the place of each of its tensors."""
    if isinstance(x, Tensor):
        return function(x)
    if isinstance(x, Mapping):
        return {name: map_tensors(function, part) for name, part in x.items()}
    return type(x)(map_tensors(function, part) for part in x) if type(x) in (tuple, list) else x


def is_real(value: Any) -> bool:
    """Whether a value is a tensor of real numbers."""
    return isinstance(value, Tensor) and value.is_floating_point()


def one_more(example: Inputs, *, batch: int) -> Inputs:
    """The example with its first sample at the end once more."""
    return map_tensors(lambda t: torch.cat([t, t[:1]]) if t.dim() and len(t) == batch else t, example)


def features(output: Any, *, accept: Callable[[Any], bool] = is_real) -> tuple[Any, Callable[[Tensor], Any]] | None:
    """The first tensor of real numbers in what a submodule returns, and a function that puts another in its place.

    None where there is none. accept: what counts as such a tensor.
    """
    if isinstance(output, Mapping):
        for name, part in output.items():
            if accept(part):
                return part, lambda h: _with(output, name, h)  # noqa: B023 (returned at once)
    elif isinstance(output, tuple | list):
        for i, part in enumerate(output):
            if accept(part):
                return part, lambda h: _with_item(output, i, h)  # noqa: B023
    return (output, lambda h: h) if accept(output) else None


def _with(output: Any, name: str, h: Tensor) -> Any:
    changed = copy.copy(output)
    changed[name] = h
    return changed


def _with_item(output: Any, i: int, h: Tensor) -> Any:
    parts = [*output[:i], h, *output[i + 1 :]]
    if isinstance(output, list):
        return parts
    return tuple(parts) if type(output) is tuple else type(output)(*parts)  # a named one


def prediction_of(output: Any, *, kind: type = Tensor) -> Any:
    """The prediction in what a model returns: the tensor itself, its `logits`, or the first element of a tuple."""
    found = output
    if isinstance(output, Mapping):
        found = output.get("logits")
    elif hasattr(output, "logits"):
        found = output.logits
    elif isinstance(output, tuple | list) and output:
        found = output[0]
    if not isinstance(found, kind):
        raise TypeError(
            f"the model returns {describe(output)}, and which of it is the prediction? Let it return a tensor, or an "
            "object with logits, or pass bll.Hooked output=, a function from what the model returns to a tensor"
        )
    return found
