"""Inputs and outputs of models and their submodules: a tensor, a tuple, a dict, an output object."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from blocklocal.arguments import describe

Inputs = Tensor | tuple[Any, ...] | Mapping[str, Any]
"""What a model takes: model(x) of a tensor, model(*x) of a tuple, model(**x) of a dict."""


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
            raise ValueError(f"{name} holds a tensor of shape {tuple(tensor.shape)}: an empty batch has no loss")


def map_tensors(function: Callable[[Tensor], Tensor], x: Any) -> Any:
    """x with function(tensor) in the place of each of its tensors."""
    if isinstance(x, Tensor):
        return function(x)
    if isinstance(x, Mapping):
        return {name: map_tensors(function, part) for name, part in x.items()}
    return tuple(map_tensors(function, part) for part in x) if isinstance(x, tuple) else x


def features(output: Any) -> tuple[Tensor, Callable[[Tensor], Any]] | None:
    """The first tensor of real numbers in what a submodule returns, and a function that puts another in its place.

    None where there is none.
    """
    if isinstance(output, Tensor):
        return (output, lambda h: h) if output.is_floating_point() else None
    if isinstance(output, Mapping):
        for name, part in output.items():
            if isinstance(part, Tensor) and part.is_floating_point():
                return part, lambda h: _with(output, name, h)  # noqa: B023 (returned at once)
    elif isinstance(output, tuple | list):
        for i, part in enumerate(output):
            if isinstance(part, Tensor) and part.is_floating_point():
                return part, lambda h: _with_item(output, i, h)  # noqa: B023
    return None


def _with(output: Any, name: str, h: Tensor) -> Any:
    changed = copy.copy(output)
    changed[name] = h
    return changed


def _with_item(output: Any, i: int, h: Tensor) -> Any:
    parts = [*output[:i], h, *output[i + 1 :]]
    if isinstance(output, list):
        return parts
    return tuple(parts) if type(output) is tuple else type(output)(*parts)  # a named one


def prediction_of(output: Any) -> Tensor:
    """The prediction in what a model returns: the tensor itself, its `logits`, or the first element of a tuple."""
    found = output
    if isinstance(output, Mapping):
        found = output.get("logits")
    elif hasattr(output, "logits"):
        found = output.logits
    elif isinstance(output, tuple | list) and output:
        found = output[0]
    if not isinstance(found, Tensor):
        raise TypeError(
            f"the model returns {describe(output)}, and which of it is the prediction? Pass output=, a function from "
            "what the model returns to a tensor"
        )
    return found
