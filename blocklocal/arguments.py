"""Checks of the arguments that a caller passes. Each error names the argument, its value and what is allowed.

TypeError: a value of the wrong type. ValueError: a value that is out of range, or that the model cannot take.
"""

from __future__ import annotations

import math
import operator
import reprlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from numbers import Real
from types import UnionType
from typing import Any

import torch
from torch import Tensor, nn


def describe(value: object) -> str:
    """Describe a value in a few words."""
    if isinstance(value, Tensor):
        if value.is_nested:
            return f"a nested tensor, {value.dtype} on {value.device}"
        sparse = "" if value.layout is torch.strided else "sparse "
        return f"a {sparse}tensor of shape {tuple(value.shape)}, {value.dtype} on {value.device}"
    if value is None or isinstance(value, bool | int | float | str):
        return reprlib.repr(value)
    if isinstance(value, type):
        return f"the class {value.__name__}"
    return f"a {type(value).__name__}"


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type if there is none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def require(value: object, kind: type | UnionType | tuple[type, ...], *, name: str, needed: str) -> None:
    """TypeError: `value` is not an instance of `kind`."""
    if not isinstance(value, kind):
        raise TypeError(f"{name} is {describe(value)}: {needed}")


def require_list(value: object, *, name: str, needed: str) -> None:
    """TypeError: not a sequence, or a string."""
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        raise TypeError(f"{name} is {describe(value)}: {needed}")


def require_tensor(value: object, *, name: str) -> None:
    """TypeError: not a tensor."""
    require(value, Tensor, name=name, needed="pass a torch.Tensor; torch.as_tensor() makes one from numbers")


def require_dense(value: object, *, name: str) -> None:
    """TypeError: not a tensor. ValueError: a tensor without values, or one that is not dense."""
    require_tensor(value, name=name)
    assert isinstance(value, Tensor)
    if value.is_meta:
        raise ValueError(f"{name} is on the meta device, where tensors have no values: pass {name} on a real device")
    if value.is_nested or value.layout is not torch.strided:
        remedy = "pad it" if value.is_nested else f"pass {name}.to_dense()"
        raise ValueError(f"{name} is {describe(value)}, but must be dense: {remedy}")


def require_device(value: object, *, name: str) -> torch.device:
    """Return the device. TypeError: neither a name nor a device. ValueError: a missing device, or the meta device."""
    require(value, str | torch.device, name=name, needed='pass a torch.device or its name, such as "cuda:0"')
    assert isinstance(value, str | torch.device)
    try:
        device = torch.device(value)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"{name}={str(value)!r} cannot be used ({first_line(error)}): pass another device") from error
    if device.type == "meta":
        raise ValueError(f"{name}='meta' computes nothing: pass a real device")
    return device


def require_module(value: object, *, name: str) -> None:
    """TypeError: not a module."""
    require(value, nn.Module, name=name, needed="pass an nn.Module")


def require_function(value: object, *, name: str, needed: str) -> None:
    """TypeError: not callable, or a class where an instance is meant."""
    if not callable(value) or isinstance(value, type):
        raise TypeError(f"{name} is {describe(value)}: {needed}")


def require_choice(value: object, choices: Sequence[str], *, name: str) -> None:
    """TypeError: not a string. ValueError: not one of the choices."""
    allowed = f"choose {', '.join(map(repr, choices))}"
    require(value, str, name=name, needed=allowed)
    if value not in choices:
        raise ValueError(f"{name}={value!r}: {allowed}")


def require_whole(value: Any, *, name: str, least: int | None = None, most: int | None = None) -> int:
    """Return the value as an int. TypeError: not a number. ValueError: a fraction, a bool, or out of range."""
    allowed = f"must be an integer{_range(name, least=least, most=most)}"
    if not isinstance(value, Real | Tensor) and not hasattr(value, "__index__"):
        raise TypeError(f"{name} is {describe(value)}: {allowed}")
    try:
        if isinstance(value, bool) or (isinstance(value, Tensor) and value.dtype is torch.bool):
            raise TypeError
        number = operator.index(value)  # pyright: ignore[reportArgumentType]
    except TypeError:
        raise ValueError(f"{name}={value!r}: {allowed}") from None
    if (least is not None and number < least) or (most is not None and number > most):
        raise ValueError(f"{name}={number}: {allowed}")
    return number


def require_number(
    value: object,
    *,
    name: str,
    above: float | None = None,
    least: float | None = None,
    below: float | None = None,
    most: float | None = None,
) -> None:
    """TypeError: not a number. ValueError: a bool, infinite, NaN or out of range."""
    allowed = f"must be a finite number{_range(name, above=above, least=least, below=below, most=most)}"
    if not isinstance(value, Real):
        raise TypeError(f"{name} is {describe(value)}: {allowed}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    inside = (
        not isinstance(value, bool)
        and math.isfinite(number)
        and (above is None or number > above)
        and (least is None or number >= least)
        and (below is None or number < below)
        and (most is None or number <= most)
    )
    if not inside:
        raise ValueError(f"{name}={value!r}: {allowed}")


def require_factor(value: object, *, name: str) -> None:
    """TypeError, ValueError: not a finite number, nor a tensor that holds one. Tensors are read on the CPU only."""
    if not isinstance(value, Tensor):
        require_number(value, name=name)
    elif value.numel() != 1 or (value.device.type == "cpu" and not value.isfinite().all()):
        raise ValueError(f"{name} is {describe(value)}: must be a finite number, or a tensor that holds one")


def require_scalar(loss: object, *, name: str) -> None:
    """Check what the function `name` returned. TypeError: not a tensor. ValueError: not a scalar, or not real."""
    require(loss, Tensor, name=f"the return value of {name}", needed="it must be a scalar tensor")
    assert isinstance(loss, Tensor)
    if loss.dim():
        raise ValueError(f"{name} returns {describe(loss)}: it must return a scalar, the mean over samples")
    if not loss.is_floating_point():
        raise ValueError(f"{name} returns {describe(loss)}: it must return a real number, which has a gradient")


def loss_of(criterion: Callable[[Tensor, Tensor], Any], prediction: Tensor, y: Tensor) -> Tensor:
    """Return criterion(prediction, y). TypeError: not a tensor. ValueError: not a real scalar, or a failure."""
    try:
        loss = criterion(prediction, y)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise ValueError(
            f"criterion fails for a prediction, {describe(prediction)}, and y, {describe(y)} "
            f"({type(error).__name__}: {first_line(error)}): pass a function (prediction, y) -> scalar that takes them"
        ) from error
    require_scalar(loss, name="criterion")
    return loss


def require_gradients(what: str) -> None:
    """ValueError: in a context that records no gradients."""
    if not torch.is_grad_enabled() or torch.is_inference_mode_enabled():
        raise ValueError(
            f"{what} needs gradients, but none are recorded here: "
            "call it outside torch.no_grad() and torch.inference_mode()"
        )


def module_of(model: Any, *, name: str = "model") -> nn.Module:
    """Return a module as it is, or a list of modules as an nn.Sequential."""
    if not isinstance(model, nn.Module):
        needed = "pass an nn.Module or a list of them"
        require(model, Sequence, name=name, needed=needed)
        for i, module in enumerate(model):
            require_module(module, name=f"{name}[{i}]")
        model = nn.Sequential(*model)
    if isinstance(model, nn.Sequential) and not len(model):
        raise ValueError(f"{name} is empty: pass at least one module")
    return model


@contextmanager
def passes(value: object, *, name: str, through: str) -> Iterator[None]:
    """Context for a forward pass of `value`: a failure becomes a ValueError that names it."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, IndexError, TypeError) as error:
        raise ValueError(f"{name}, {describe(value)}, does not go through {through} ({first_line(error)})") from error


def _range(
    name: str,
    *,
    above: float | None = None,
    least: float | None = None,
    below: float | None = None,
    most: float | None = None,
) -> str:
    """The range of a number as text, such as ", 0 <= forgetting < 1"."""
    low = "" if above is None and least is None else f"{above} < " if least is None else f"{least} <= "
    high = "" if below is None and most is None else f" < {below}" if most is None else f" <= {most}"
    if low and not high:
        return f", {name} {'>' if least is None else '>='} {above if least is None else least}"
    return f", {low}{name}{high}" if high else ""
