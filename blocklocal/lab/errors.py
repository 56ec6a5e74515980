"""Errors that the user can fix: one line that says what is wrong, why, and what to do."""

from __future__ import annotations

import contextlib
import os
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import torch

from blocklocal.arguments import first_line


class UserError(ValueError):
    """Unusable arguments or data. The command prints the message in one line and exits with code 2."""


@contextmanager
def blame(subject: str, *, unless: Callable[[BaseException], bool] = lambda _: False) -> Iterator[None]:
    """Turn any error in the user's code into a UserError that names the subject, the kind of error and the line.

    unless: whether an error is not due to the user's code; it is then raised unchanged.
    """
    try:
        yield
    except (UserError, KeyboardInterrupt):
        raise
    except BaseException as error:  # SystemExit too, with which a module may end at its import
        if unless(error):
            raise
        kind, text = type(error).__name__, str(error).strip()
        said = f"{kind}: {first_line(error)}" if text else kind
        raise UserError(f"{subject}: {said}{place(error)}") from error


def lacks_memory(error: BaseException) -> bool:
    """Whether memory has run out. torch has an exception class for GPU memory only."""
    words = ("can't allocate memory", "not enough memory", "Storage size calculation overflowed")
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(word in str(error) for word in words)
    )


def of_machine(error: BaseException) -> bool:
    """Whether the error comes from files, connections or memory, and might not recur."""
    return any(isinstance(one, OSError) or lacks_memory(one) for one in _chain(error))


def place(error: BaseException) -> str:
    """The last line that ran outside this package and torch, in words; a SyntaxError names its own line."""
    if isinstance(error, SyntaxError):
        return ""
    specs = [find_spec(name) for name in ("blocklocal", "torch")]
    packages = [f"{Path(spec.origin).parent}{os.sep}" for spec in specs if spec and spec.origin]
    inside = ("<", contextlib.__file__, *packages)
    for one in _chain(error):
        frames = [frame for frame in traceback.extract_tb(one.__traceback__) if not frame.filename.startswith(inside)]
        if frames:
            return f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})"
    return ""


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An error and those that it was raised from."""
    one: BaseException | None = error
    while one is not None:
        yield one
        one = one.__cause__
