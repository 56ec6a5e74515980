"""A grid of settings: a file with one plain Python list, each item the settings of a row."""

from __future__ import annotations

import ast
from collections import Counter
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from blocklocal.lab.errors import UserError
from blocklocal.lab.runs.schema import convert_to, read
from blocklocal.lab.settings import NOT_STORED, Settings

NAME, SHARED = "name", ("data", "seed", "validation", *NOT_STORED)


@dataclass(frozen=True)
class Row:
    """Settings to train with every seed. name: in tables and pictures, and of the folders of its runs."""

    name: str
    settings: Settings


def read_grid(file: Path, *, shared: Settings) -> list[Row]:
    """Read the rows of a file such as

        # comments are allowed
        [
            {"rule": "bp"},
            {"name": "pooled, one per unit", "head": "pooled", "at": ["layer1.0", "layer1.1"]},
        ]

    Missing settings come from the shared ones. The file is parsed, not run.
    UserError: anything else; an unknown setting, or one that all rows share; a name twice.
    """
    try:
        items = ast.literal_eval(read(file).decode())
        if not isinstance(items, list) or not items:
            raise ValueError("it must be one list with an item for each row")
        rows = [_row(item, number, shared=shared) for number, item in enumerate(items, start=1)]
        name, times = Counter(row.name for row in rows).most_common(1)[0]
        if times > 1:
            raise ValueError(f'{times} rows are called {name!r}: give each a "name" of its own')
    except (ValueError, SyntaxError, RecursionError, MemoryError) as error:
        if isinstance(error, SyntaxError):
            error = ValueError(f"line {error.lineno}: {error.msg}")
        raise UserError(
            f"{str(file)!r} is not a grid of settings ({str(error) or 'it is nested too deeply'})"
        ) from error
    return rows


def _row(item: Any, number: int, *, shared: Settings) -> Row:
    if not isinstance(item, dict):
        raise ValueError(f"item {number} must be a dictionary of settings")
    given = {str(name): value for name, value in item.items()}
    name = given.pop(NAME, None)
    known = {field.name for field in fields(Settings)}
    for setting in given:
        if setting not in known:
            raise ValueError(f"item {number}: unknown setting {setting!r}")
        if setting in SHARED:
            raise ValueError(f"item {number}: {setting!r} is the same in all rows: give it as an option of the command")
    if name is None:
        name = ", ".join(f"{setting} {value}" for setting, value in given.items()) or shared.rule
    if not isinstance(name, str) or not name.strip():
        raise ValueError(f'item {number}: "name" is {name!r}, but must be text')
    try:
        return Row(name, convert_to(asdict(shared) | given, Settings))
    except ValueError as error:
        raise ValueError(f"item {number}: {error}") from error
