"""The user's own functions, named package.module:function on the command line."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from typing import Any

from blocklocal.lab.errors import UserError


def own_function(name: str, *, kind: str, positional: int = 0, keywords: tuple[str, ...]) -> Callable[..., Any]:
    """The function named package.module:function. kind: what it makes, "model" or "rule", for messages.

    UserError: no such module or function, or one that does not accept these arguments.
    """
    module, _, function = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), function, None)
    except ModuleNotFoundError as error:
        if not (module == error.name or module.startswith(f"{error.name}.")):
            raise
        raise UserError(f"{kind} {name!r}: there is no module {error.name!r}; put its folder on PYTHONPATH") from error
    if not isinstance(found, Callable):
        raise UserError(f"{kind} {name!r}: module {module!r} has no function {function!r}")
    needed = [*["a model"] * positional, f"{', '.join(f'{word}=' for word in keywords)} by name"]
    try:
        inspect.signature(found).bind(*[None] * positional, **dict.fromkeys(keywords))
    except TypeError as error:
        raise UserError(f"{kind} {name!r} must accept {' and '.join(needed)} ({error})") from error
    return found
