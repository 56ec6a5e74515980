"""What the files of a run hold, and what is wrong with one that holds something else."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, NotRequired, TypedDict

from msgspec import Meta, ValidationError, convert

from blocklocal.lab.errors import UserError
from blocklocal.lab.settings import CHANGES, NOT_STORED, Settings

Count = Annotated[int, Meta(ge=1)]
Share = Annotated[float, Meta(ge=0, le=1)]
Amount = Annotated[float, Meta(ge=0, le=1e12)]
Finite = Annotated[float, Meta(ge=-1e30, le=1e30)]

RENAMED = {"message": "message_dtype"}  # since version 0.1.0
# Settings that came after version 0.1.0. A run that does not know one was trained as its default says.
LATER = {"clip", "accumulate", "validation", "add_beliefs", *CHANGES}


class Config(TypedDict):
    """config.json."""

    settings: dict[str, Any]
    data: dict[str, Any]
    parameters: int
    blocks: Count
    steps: Count
    processes: Count
    versions: dict[str, str]
    device: dict[str, str | int]
    git: str | None


class Border(TypedDict):
    """What was measured at a border; nan where that is no number."""

    agreement: float
    variance_ratio: float


class Epoch(TypedDict):
    """A line of metrics.jsonl. train_loss, test_accuracy: of each block. angles: of each layer, some of them nan.
    validation_accuracy: where images were held out, and exit_weights, by which all exits are combined."""

    epoch: Count
    train_loss: list[Finite]
    test_accuracy: list[Share]
    test_accuracy_all: Share
    seconds: Amount
    peak_memory_mib: Amount
    borders: list[Border]
    angles: NotRequired[dict[str, float]]
    validation_accuracy: NotRequired[list[Share]]
    validation_accuracy_all: NotRequired[Share]
    exit_weights: NotRequired[list[Finite]]


def read_config(file: Path) -> dict[str, Any]:
    """All that a config.json says. UserError: it is not what a run writes."""
    content = read(file)
    try:
        return _parse(content, Config)
    except ValueError as error:
        raise _misfit(file, error) from error


def read_settings(file: Path) -> Settings:
    """Those of a config.json. UserError: it is not what a run writes; settings of another version, or out of range."""
    found: dict[str, Any] = read_config(file)["settings"]
    stored = {RENAMED.get(name, name): value for name, value in found.items()}
    known = {field.name for field in fields(Settings)} - set(NOT_STORED)
    try:
        if unknown := stored.keys() - known:
            raise ValueError(f"settings: {min(unknown)!r} is unknown")
        if missing := known - LATER - stored.keys():
            raise ValueError(f"settings: {min(missing)!r} is missing")
        settings = convert_to(stored, Settings)
        settings.check()
    except ValueError as error:
        raise _misfit(file, error) from error
    return settings


def read_epochs(file: Path, *, blocks: int, epochs: int) -> list[dict[str, Any]]:
    """The whole lines of a metrics.jsonl: a kill may leave half a line at the end.

    UserError: a line that is not what a run of so many blocks and epochs writes there.
    """
    found = []
    for number, line in enumerate(read(file).split(b"\n")[:-1], start=1):
        try:
            record = _parse(line, Epoch)
            if record["epoch"] != number or number > epochs:
                raise ValueError(f"epoch: expected {min(number, epochs)}, got {record['epoch']}")
            for name, length in (("train_loss", blocks), ("test_accuracy", blocks), ("borders", blocks - 1)):
                if len(record[name]) != length:
                    raise ValueError(f"{name}: expected {length} for {blocks} blocks, got {len(record[name])}")
        except ValueError as error:
            raise UserError(f"line {number} of {str(file)!r} is no epoch's record ({error})") from error
        found.append(record)
    return found


def read(file: Path) -> bytes:
    """UserError: there is no such file, or it cannot be read."""
    try:
        if file.exists() and not file.is_file():  # a pipe would be waited for
            raise UserError(f"{str(file)!r} is not a regular file")
        return file.read_bytes()
    except OSError as error:
        raise UserError(f"{str(file)!r} cannot be read ({error.strerror})") from error


def _parse(line: bytes, kind: type) -> dict[str, Any]:
    """ValueError: no JSON, no text that can be written again, or not of this kind."""
    try:
        found = json.loads(line.decode())
        json.dumps(found, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError("nested too deeply") from None
    convert_to(found, kind)
    return found


def convert_to(found: Any, kind: type) -> Any:
    """Plain values as an object of this kind. ValueError: they do not fit; which, and why."""
    try:
        return convert(found, kind)
    except ValidationError as error:
        what, _, where = str(error).replace("`", "").partition(" - at $")
        raise ValueError(f"{where.removeprefix('.')}: {what}" if where else what) from None


def _misfit(file: Path, error: ValueError) -> UserError:
    return UserError(f"{str(file)!r} is not a configuration of this version ({error})")
