"""Output of the commands: consoles that print names literally, and streams whose failure does not end a run."""

from __future__ import annotations

import codecs
import contextlib
import io
import os
import sys
from typing import Any, TextIO

from rich.console import Console
from rich.text import Text

from blocklocal.lab.names import plain

# For output in ASCII; any other character is shown by its number.
ASCII = {"±": "+-", "−": "-", "–": "-", "…": "...", "│": "|", "─": "-", "━": "-"}


class Terminal(Console):
    """A console that does not interpret brackets, colons and escape characters in strings."""

    def __init__(self, *, stderr: bool = False) -> None:
        super().__init__(stderr=stderr, markup=False, emoji=False, highlight=False)

    def render_str(self, text: str, **how: Any) -> Text:
        return super().render_str(plain(text), **how)


class Expendable(io.FileIO):
    """A file for output that may be lost: a full disk or a closed pipe raises no error."""

    def write(self, content: Any) -> int:
        try:
            return super().write(content)
        except OSError:
            return len(content)


def expendable(descriptor: int, mode: str, *, like: TextIO | None = None) -> TextIO:
    """A stream that may fail without an error, on an open file, with the encoding of `like`."""
    raw = io.BufferedWriter(Expendable(descriptor, mode))
    encoding, errors = (like.encoding, like.errors) if like else ("utf-8", "backslashreplace")
    return io.TextIOWrapper(raw, encoding, errors=errors, line_buffering=True)


def prepare_streams() -> None:
    """Prepare the streams of a command: standard error is expendable, and both accept every character."""
    codecs.register_error("blocklocal", _replace)
    if sys.stdout is None:  # closed by the caller
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (for as long as the process lives)
    if sys.stderr is None:
        sys.stderr = sys.__stderr__ = open(os.devnull, "w")  # noqa: SIM115
    elif sys.stderr is sys.__stderr__:
        raw = io.BufferedWriter(Expendable(sys.stderr.fileno(), "w", closefd=False))
        sys.stderr = sys.__stderr__ = io.TextIOWrapper(raw, sys.stderr.encoding, line_buffering=True)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="blocklocal")  # pyright: ignore[reportAttributeAccessIssue]


def flush_output() -> None:
    """Flush standard output. OSError: it cannot be written; this is not tried again as the process ends."""
    try:
        sys.stdout.flush()
    except OSError:
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise


def _replace(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    letters = error.object[error.start : error.end]
    return "".join(ASCII.get(letter, letter.encode("unicode_escape").decode()) for letter in letters), error.end
