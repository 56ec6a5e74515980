"""What a person can put right: one line that says what, why, and what to do."""

from __future__ import annotations

import os
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from blocklocal.arguments import first_line


class UserError(ValueError):
    """Unusable arguments or data. The command prints it in one line and exits with code 2."""


@contextmanager
def blame(subject: str) -> Iterator[None]:
    """Whatever goes wrong in code of the user's is a UserError that names the subject, the kind and the line."""
    try:
        yield
    except (UserError, KeyboardInterrupt):
        raise
    except BaseException as error:  # SystemExit too, with which a module may end at its import
        kind, text = type(error).__name__, str(error).strip()
        said = f"{kind}: {first_line(error)}" if text else kind
        raise UserError(f"{subject}: {said}{_place(error)}") from error


def _place(error: BaseException) -> str:
    """The last line of code that ran outside this package and torch; a SyntaxError says its own."""
    if isinstance(error, SyntaxError):
        return ""
    specs = [find_spec(name) for name in ("blocklocal", "torch")]
    inside = ("<", *(f"{Path(spec.origin).parent}{os.sep}" for spec in specs if spec and spec.origin))
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith(inside)]
    return f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
