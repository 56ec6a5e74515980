"""What an option may be, said beside it and checked in one place: `lr: Annotated[float, Range(above=0)]`."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import MISSING, Field, dataclass, fields
from functools import cache
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from tyro.conf import Positional

from blocklocal.lab.errors import UserError

PATH, PART = 4095, 255  # bytes: the longest path, and name in it, that a file system takes
LARGEST = 2**31 - 1  # of whole numbers, where no other bound is said: they go to functions that take 32 or 64 bits


@dataclass(frozen=True, kw_only=True)
class Range:
    """The numbers that an option may be: from `least` to `most`, more than `above`, less than `below`.

    Never infinite, never nan. Of a tuple, every number.
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
        """UserError: outside. name: of the option, as it is called on the command line."""
        if value not in self:
            beyond = "" if isinstance(value, float) or value < LARGEST or self.most < math.inf else f", up to {LARGEST}"
            raise UserError(f"{name} {value} is out of range: {self}{beyond}")


@dataclass(frozen=True)
class Needs:
    """An option that does nothing unless another has one of these values; none named: any but its default."""

    other: str
    values: tuple[Any, ...] = ()


def check(options: Any) -> None:
    """Of a dataclass of options. UserError: a number out of its `Range`, text that is empty, endless or no text."""
    for name, value, beside in _given(options):
        for item in value if isinstance(value, tuple) else (value,):
            _check_text(name, item)
            for bounds in beside:
                if isinstance(bounds, Range) and item is not None:
                    bounds.check(name, item)


def check_needs(options: Any) -> None:
    """Of a dataclass of options. UserError: one without what it `Needs`."""
    defaults = {field.name: _default(field) for field in fields(options)}
    for name, _, beside in _given(options):
        for need in beside:
            if not isinstance(need, Needs):
                continue
            there, other = getattr(options, need.other), called(need.other)
            if not (there in need.values if need.values else there != defaults[need.other]):
                values = " or ".join(map(str, filter(None, need.values)))
                how = f"with {other} {values}".rstrip() if values or not need.values else f"without {other}"
                raise UserError(f"{name} has an effect only {how}")


@cache
def declared(kind: type) -> dict[str, tuple[Any, tuple[Any, ...]]]:
    """Of a dataclass of options: the type of every field, and what is declared beside it."""
    hints = get_type_hints(kind, include_extras=True)
    parts = {name: get_args(hint) if get_origin(hint) is Annotated else (hint,) for name, hint in hints.items()}
    return {name: (first, tuple(rest)) for name, (first, *rest) in parts.items()}


def _given(options: Any) -> Iterator[tuple[str, Any, tuple[Any, ...]]]:
    """Of every option that is not as it is by default: what it is called, its value, what is declared beside it."""
    for field in fields(options):
        value, (_, beside) = getattr(options, field.name), declared(type(options))[field.name]
        if value != _default(field):
            yield called(field.name, beside), value, beside


def called(name: str, beside: tuple[Any, ...] = ()) -> str:
    """The field as it stands on the command line: BATCH of a positional one, else --batch-size."""
    return name.upper() if get_args(Positional[int])[1] in beside else f"--{name.replace('_', '-')}"


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
        raise UserError(f"{name} {text!r} is not text: it has bytes that are no UTF-8, or a null character")
    if len(encoded) > PATH or max(map(len, encoded.split(b"/"))) > PART:
        raise UserError(f"{name} {text!r} is too long for a file: {len(text)} characters")
