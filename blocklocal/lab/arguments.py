"""Parses command-line arguments into a dataclass, and reports a wrong one in one line."""

from __future__ import annotations

import contextlib
import inspect
import io
import os
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar, get_origin

import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from blocklocal.lab import groups, ranges
from blocklocal.lab.errors import UserError

Arguments = TypeVar("Arguments")

RENAMED = {"--patience": "--timeout", "--message": "--message-dtype"}
HELP = {"-h", "--help"}
WHOLE = re.compile(r"[+-]?\d{1,40}", re.ASCII)
DECIMAL = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?|[+-]?inf|nan", re.ASCII | re.IGNORECASE)
REGISTRY = ConstructorRegistry()
REGISTRY.struct_rule(groups.struct_rule)


def parse(kind: type[Arguments], args: Sequence[str], *, prog: str, default: Arguments | None = None) -> Arguments:
    """Parse the arguments as `kind`, with absent ones from `default`. --help prints the help and exits.

    UserError: unusable arguments, including what `ranges` refuses.
    """
    _refuse_renamed(args)
    _refuse_misused(kind, args, prog=prog)
    with _in_one_line(args, prog=prog):
        found = _parse(kind, args, prog=prog, default=tyro.MISSING_NONPROP if default is None else default)
    return _checked(found)


def parse_known(kind: type[Arguments], args: Sequence[str], *, prog: str) -> tuple[Arguments, list[str]]:
    """Parse the arguments that `kind` knows, and return the others too. UserError: as for `parse`."""
    _refuse_renamed(args)
    _refuse_misused(kind, args, prog=prog)
    with _in_one_line(args, prog=prog):
        found, others = _parse(kind, args, prog=prog, return_unknown_args=True)
    return _checked(found), others


def _parse(kind: type, args: Sequence[str], **how: Any) -> Any:
    read = groups.grouped(kind) if HELP & set(args) else kind  # both give the same; kind itself takes less time
    return tyro.cli(read, args=args, description=inspect.getdoc(kind), registry=REGISTRY, **how)


def _refuse_renamed(args: Sequence[str]) -> None:
    for arg in args:
        name = arg.partition("=")[0]
        if name in RENAMED:
            raise UserError(f"{name} is called {RENAMED[name]} since version 0.2")


def _checked(options: Arguments) -> Arguments:
    ranges.check(options)
    ranges.check_needs(options)
    return options


@REGISTRY.primitive_rule
def _numbers(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
    """Accept decimal digits only: Python itself also reads 1_0 as ten, and digits of other scripts."""
    if info.type is int:
        return _number(int, WHOLE, what="a whole number", metavar="INT")
    if info.type is float:
        return _number(float, DECIMAL, what="a number", metavar="FLOAT")
    return None


def _number(kind: Callable[[str], Any], form: re.Pattern[str], *, what: str, metavar: str) -> Any:
    def read(args: list[str]) -> Any:
        if not form.fullmatch(args[0]):
            raise ValueError(f"{args[0]!r} is not {what}")
        return kind(args[0])

    return PrimitiveConstructorSpec(
        nargs=1,
        metavar=metavar,
        instance_from_str=read,
        is_instance=lambda value: isinstance(value, int | float),
        str_from_instance=lambda value: [str(value)],
    )


def _refuse_misused(kind: type, args: Sequence[str], *, prog: str) -> None:
    """Refuse what tyro lets pass.

    UserError: an option given twice, of which only one would count; a value for a flag, which would be read as another
    argument; no value for an option that takes several; an empty value, which as a path would be the current folder.
    """
    kinds = {ranges.called(name): type for name, (type, _) in ranges.declared(kind).items()}
    seen: set[str] = set()
    for i, arg in enumerate(args):
        given, equals, value = arg.partition("=")
        if not arg.strip():
            raise UserError(f"argument {i + 1} of {prog} is empty: {arg!r}")
        written = given.replace("_", "-")
        name = written if written in kinds else re.sub("^--no-", "--", written)
        if name not in kinds:
            continue
        if name in seen:
            raise UserError(f"{name} is given twice")
        seen.add(name)
        if equals and not value.strip():
            raise UserError(f"{arg}: the value is empty")
        if kinds[name] is bool and equals:
            raise UserError(f"{arg}: {given} takes no value")
        alone = not equals and (i + 1 == len(args) or args[i + 1].startswith("--"))
        if get_origin(kinds[name]) is tuple and alone:
            raise UserError(f"{name} needs a value")


@contextlib.contextmanager
def _in_one_line(args: Sequence[str], *, prog: str) -> Iterator[None]:
    if HELP & set(args):
        yield
        return
    complaint = io.StringIO()
    try:
        with _wide(), contextlib.redirect_stderr(complaint), contextlib.redirect_stdout(complaint):
            yield
    except SystemExit:
        raise UserError(f"{_first_paragraph(complaint.getvalue())} (see {prog} --help)") from None


@contextlib.contextmanager
def _wide() -> Iterator[None]:
    """Pretend that the terminal is wide, so that no line is broken."""
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "100000"
    try:
        yield
    finally:
        if before is None:
            del os.environ["COLUMNS"]
        else:
            os.environ["COLUMNS"] = before


def _first_paragraph(box: str) -> str:
    """The text between the first two lines of hyphens, which frame tyro's box where the output is not a terminal."""
    lines = [line.strip() for line in box.splitlines()]
    rules = [i for i, line in enumerate(lines) if line and not line.strip("-")]
    return " ".join(" ".join(lines[rules[0] + 1 : rules[1]]).split())
