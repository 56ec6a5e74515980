"""Command-line arguments into a dataclass, and what is wrong with them in one line."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator, Sequence
from typing import TypeVar

import tyro

from blocklocal.lab.errors import UserError

Arguments = TypeVar("Arguments")


def parse(kind: type[Arguments], args: Sequence[str], *, prog: str, default: Arguments | None = None) -> Arguments:
    """The arguments as `kind`, absent ones from `default`; --help is printed and exits. UserError: unusable ones."""
    with _in_one_line(prog):
        return tyro.cli(kind, args=args, prog=prog, default=tyro.MISSING_NONPROP if default is None else default)


def parse_known(kind: type[Arguments], args: Sequence[str], *, prog: str) -> tuple[Arguments, list[str]]:
    """The arguments that `kind` knows, and the others. UserError: unusable ones."""
    with _in_one_line(prog):
        return tyro.cli(kind, args=args, prog=prog, return_unknown_args=True)


@contextlib.contextmanager
def _in_one_line(prog: str) -> Iterator[None]:
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            yield
    except SystemExit as stop:
        if not stop.code:
            raise
        raise UserError(f"{_first_paragraph(complaint.getvalue())} (see {prog} --help)") from None


def _first_paragraph(box: str) -> str:
    """The text of tyro's box down to its first rule, on one line."""
    lines = [line.strip(" │") for line in box.splitlines()[1:]]
    end = next((i for i, line in enumerate(lines) if not line.strip("─╰╯")), len(lines))
    return " ".join(lines[:end]).strip()
