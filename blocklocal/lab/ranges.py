"""Ranges of options, declared with the option and checked in one place: `lr: Annotated[float, Range(above=0)]`."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import MISSING, Field, dataclass, fields
from functools import cache
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from tyro.conf import Positional

from blocklocal.lab.errors import UserError

PATH, PART = 4095, 255  # bytes: the longest path, and name in it, that a file system accepts
LARGEST = 2**31 - 1  # of whole numbers without another bound: they go to functions that take 32 or 64 bits


@dataclass(frozen=True, kw_only=True)
class Range:
    """The numbers that an option accepts: from `least` to `most`, more than `above`, less than `below`.

    Never infinite, never nan. In a tuple, every number must be in the range.
    """

    least: float = -math.inf
    above: float = -math.inf
    most: float = math.inf
    below: float = math.inf

    def __contains__(self, value: float) -> bool:
        bounded = isinstance(value, float) or self.most < math.inf or value <= LARGEST
        inside = self.least <= value <= self.most and self.above < value < self.below
        return inside and bounded and math.isfinite(value)

    def __str__(self) -> str:
        if self.above > -math.inf and self.below < math.inf:
            return f"between {self.above:g} and {self.below:g}"
        low = f"more than {self.above:g}" if self.above > -math.inf else f"{self.least:g}"
        if self.most < math.inf:
            return f"{low} to {self.most}"
        if self.below < math.inf:
            return f"{low} to less than {self.below:g}"
        return low if self.above > -math.inf else f"{low} or more"

    def check(self, name: str, value: float) -> None:
        """Check a value. UserError: it is outside. name: of the option, as on the command line."""
        if value not in self:
            beyond = "" if isinstance(value, float) or value < LARGEST or self.most < math.inf else f", up to {LARGEST}"
            raise UserError(f"{name} {value} is out of range: {self}{beyond}")


@dataclass(frozen=True)
class Needs:
    """Marks an option that does nothing unless another has one of these values, or any but its default if none is
    named; or where `otherwise` is met."""

    other: str
    values: tuple[Any, ...] = ()
    otherwise: Needs | None = None

    def met(self, options: Any, defaults: dict[str, Any]) -> bool:
        there = getattr(options, self.other)
        own = there in self.values if self.values else there != defaults[self.other]
        return own or (self.otherwise is not None and self.otherwise.met(options, defaults))

    def __str__(self) -> str:
        other, values = called(self.other), " or ".join(map(str, filter(None, self.values)))
        how = f"with {other} {values}".rstrip() if values or not self.values else f"without {other}"
        return how if self.otherwise is None else f"{how}, or {self.otherwise}"


def check(options: Any) -> None:
    """Check a dataclass of options. UserError: a number out of its `Range`; text that is empty, too long or invalid."""
    for name, value, beside in _given(options):
        for item in value if isinstance(value, tuple) else (value,):
            _check_text(name, item)
            for bounds in beside:
                if isinstance(bounds, Range) and item is not None:
                    bounds.check(name, item)


def check_needs(options: Any) -> None:
    """Check a dataclass of options. UserError: an option without what it `Needs`."""
    defaults = {field.name: _default(field) for field in fields(options)}
    for name, _, beside in _given(options):
        for need in beside:
            if isinstance(need, Needs) and not need.met(options, defaults):
                raise UserError(f"{name} has an effect only {need}")


@cache
def declared(kind: type) -> dict[str, tuple[Any, tuple[Any, ...]]]:
    """The type of every field of a dataclass of options, and what is declared with it."""
    hints = get_type_hints(kind, include_extras=True)
    parts = {name: get_args(hint) if get_origin(hint) is Annotated else (hint,) for name, hint in hints.items()}
    return {name: (first, tuple(rest)) for name, (first, *rest) in parts.items()}


def _given(options: Any) -> Iterator[tuple[str, Any, tuple[Any, ...]]]:
    """Name, value and declarations of every option that differs from its default."""
    for field in fields(options):
        value, (_, beside) = getattr(options, field.name), declared(type(options))[field.name]
        if value != _default(field):
            yield called(field.name, beside), value, beside


def called(name: str, beside: tuple[Any, ...] = ()) -> str:
    """The name of a field on the command line: BATCH_SIZE if it is positional, else --batch-size."""
    return name.upper() if get_args(Positional[int])[1] in beside else f"--{name.rstrip('_').replace('_', '-')}"


def _default(field: Field[Any]) -> Any:
    return field.default if field.default_factory is MISSING else field.default_factory()


def _check_text(name: str, value: Any) -> None:
    if not isinstance(value, str | Path):
        return
    text = str(value)
    if not text.strip():
        raise UserError(f"{name} {text!r} is empty")
    try:
        encoded = text.encode()
    except UnicodeEncodeError:
        encoded = b"\0"
    if b"\0" in encoded:
        raise UserError(f"{name} {text!r} is not text: it contains bytes that are not UTF-8, or a null character")
    if len(encoded) > PATH or max(map(len, encoded.split(b"/"))) > PART:
        raise UserError(f"{name} {text!r} is too long for a file: {len(text)} characters")
