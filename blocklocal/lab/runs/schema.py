"""The format of the files of a run, and what is wrong with an invalid one."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, NotRequired, TypedDict

from msgspec import Meta, ValidationError, convert

from blocklocal.lab.errors import UserError
from blocklocal.lab.settings import CHANGES, NOT_STORED, Settings
from blocklocal.lab.tasks.measure import Measure

Count = Annotated[int, Meta(ge=1)]
Share = Annotated[float, Meta(ge=0, le=1)]
Amount = Annotated[float, Meta(ge=0, le=1e12)]
Error = Annotated[float, Meta(ge=0, le=1e300)]
Finite = Annotated[float, Meta(ge=-1e30, le=1e30)]

RENAMED = {"message": "message_dtype"}  # since version 0.1.0
# Settings added after version 0.1.0. A run without one was trained with its default.
LATER = {
    *("clip", "accumulate", "validation", "add_beliefs", "optimizer", "beta2", "model_args", "weights"),
    *("context", "windows", "vocabulary", "target", "target_type"),
    *CHANGES,
}


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
    """Measurements at a border; nan where one is not a number."""

    agreement: float
    variance_ratio: float


class Epoch(TypedDict):
    """A line of metrics.jsonl. train_loss, test_accuracy: of each block. angles: of each layer, some of them nan.
    test_loss: in nats. test_rmse: instead of accuracy and loss, where a number is predicted, in its own unit.
    validation_accuracy, validation_rmse: where samples were held out, and exit_weights, by which all exits are
    combined. test_accuracy_all, test_rmse_all: left out before the last epoch where blocks were trained one at a time
    and merged."""

    epoch: Count
    train_loss: list[Finite]
    seconds: Amount
    peak_memory_mib: Amount
    borders: list[Border]
    test_accuracy: NotRequired[list[Share]]
    test_accuracy_all: NotRequired[Share]
    test_loss: NotRequired[list[Finite]]
    test_loss_all: NotRequired[Finite]
    test_rmse: NotRequired[list[Error]]
    test_rmse_all: NotRequired[Error]
    angles: NotRequired[dict[str, float]]
    validation_accuracy: NotRequired[list[Share]]
    validation_accuracy_all: NotRequired[Share]
    validation_rmse: NotRequired[list[Error]]
    validation_rmse_all: NotRequired[Error]
    exit_weights: NotRequired[list[Finite]]


def read_config(file: Path) -> dict[str, Any]:
    """The content of a config.json. UserError: it is not as a run writes it."""
    content = read(file)
    try:
        return _parse(content, Config)
    except ValueError as error:
        raise _misfit(file, error) from error


def read_settings(file: Path) -> Settings:
    """The settings in a config.json. UserError: not as a run writes it; settings of another version or out of range."""
    return settings_of(read_config(file)["settings"], file=file)


def settings_of(found: dict[str, Any], *, file: Path) -> Settings:
    """The settings that a file holds. UserError: settings of another version or out of range."""
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


def read_epochs(
    file: Path, *, blocks: int, epochs: int, measures: Sequence[Measure], merged: bool = False
) -> list[dict[str, Any]]:
    """The records in a metrics.jsonl, without a partial line at the end, which a kill may leave.

    measures: what is read of the tests. merged: whether the blocks were trained one at a time. UserError: a line that a
    run with this number of blocks and epochs would not write.
    """
    found = []
    for number, line in enumerate(read(file).split(b"\n")[:-1], start=1):
        try:
            record = _parse(line, Epoch)
            if record["epoch"] != number or number > epochs:
                raise ValueError(f"epoch: expected {min(number, epochs)}, got {record['epoch']}")
            tests = [f"test_{measure.name}" for measure in measures]
            for name in (*tests, *(f"{test}_all" for test in tests if not (merged and number < epochs))):
                if name not in record:
                    raise ValueError(f"missing required field {name}")
            for name, length in (("train_loss", blocks), *((test, blocks) for test in tests), ("borders", blocks - 1)):
                if len(record[name]) != length:
                    raise ValueError(f"{name}: expected {length} for {blocks} blocks, got {len(record[name])}")
        except ValueError as error:
            raise UserError(f"line {number} of {str(file)!r} is not the record of an epoch ({error})") from error
        found.append(record)
    return found


def read(file: Path) -> bytes:
    """Read a file. UserError: it does not exist, or cannot be read."""
    try:
        if file.exists() and not file.is_file():  # reading a pipe could block
            raise UserError(f"{str(file)!r} is not a regular file")
        return file.read_bytes()
    except OSError as error:
        raise UserError(f"{str(file)!r} cannot be read ({error.strerror})") from error


def _parse(line: bytes, kind: type) -> dict[str, Any]:
    """Parse JSON. ValueError: it is invalid, cannot be written as text again, or is not of this type."""
    try:
        found = json.loads(line.decode())
        json.dumps(found, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError("nested too deeply") from None
    convert_to(found, kind)
    return found


def convert_to(found: Any, kind: type) -> Any:
    """Convert plain values to an object of this type. ValueError: which value does not fit, and why."""
    try:
        return convert(found, kind)
    except ValidationError as error:
        what, _, where = str(error).replace("`", "").partition(" - at $")
        raise ValueError(f"{where.removeprefix('.')}: {what}" if where else what) from None


def _misfit(file: Path, error: ValueError) -> UserError:
    return UserError(f"{str(file)!r} is not a configuration of this version ({error})")
