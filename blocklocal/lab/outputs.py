"""Output files of a command: checked before the work begins, and written completely or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from blocklocal.lab.errors import UserError

PROBE = 2**16  # bytes for which there must be room
PICTURES = (".svg", ".png")
CHECKPOINTS, TRACES, EVENTS = "checkpoint", "trace", "tensorboard"  # folders in that of a run
CONFIG, METRICS, MODEL = "config.json", "metrics.jsonl", "model.safetensors"  # in the folder of a run
BLOCK = "block.json"  # instead of config.json, in the folder of a block that was trained alone


@contextmanager
def room(folder: Path, *, flag: str) -> Iterator[None]:
    """A folder for files, created if necessary; folders created for it are removed if they are empty at the end.

    flag: the option that names it. UserError: no file can be written there.
    """
    made = [path for path in (folder, *folder.parents) if not os.path.lexists(path)]
    try:
        try:
            _try(folder)
        except (OSError, ValueError) as error:
            raise UserError(f"{flag} {str(folder)!r} cannot be written to ({reason(error)})") from error
        yield
    finally:
        for path in made:
            with suppress(OSError, ValueError):
                path.rmdir()


def check_file(file: Path, *, flag: str) -> None:
    """Check that a file can be written. UserError: it cannot, or it is one that a run needs."""
    if os.path.exists(file) and not os.path.isfile(file):
        raise UserError(f"{flag} {str(file)!r} is not a regular file")
    if file.name in (CONFIG, METRICS, MODEL) and os.path.exists(file.parent / CONFIG):
        raise UserError(f"{flag} {str(file)!r} would overwrite a file of the run: choose another name")
    for folder in file.parents:
        if folder.name in (CHECKPOINTS, TRACES, EVENTS) and os.path.exists(folder.parent / CONFIG):
            raise UserError(f"{flag} {str(file)!r} is among the {folder.name} files of a run: choose another place")
    with room(file.parent, flag=flag):
        try:
            _part(file).touch()
            _part(file).unlink()
        except (OSError, ValueError) as error:
            raise UserError(f"{flag} {str(file)!r} cannot be written ({reason(error)})") from error


def check_picture(file: Path, *, flag: str) -> None:
    """Check that a picture can be written. UserError: see `check_file`; a format that cannot be drawn."""
    if file.suffix not in PICTURES:
        raise UserError(f"{flag} {str(file)!r}: a picture must be {' or '.join(PICTURES)}")
    check_file(file, flag=flag)


def write(file: Path, how: Callable[[Path], object]) -> None:
    """Write a file next to `file`, then rename it to `file`. OSError: this failed, and nothing has changed."""
    file = Path(os.path.realpath(file))  # not a link, but where it leads
    part = _part(file)
    try:
        how(part)
        with part.open("rb") as content:
            os.fsync(content.fileno())
        part.replace(file)
    except (OSError, SafetensorError) as error:
        raise OSError(f"{str(file)!r} was not written ({reason(error)})") from error
    finally:
        with suppress(OSError):
            part.unlink()


def _try(folder: Path, *, again: int = 3) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
            file.write(bytes(PROBE))
    except (FileExistsError, FileNotFoundError):
        if not again:
            raise
        _try(folder, again=again - 1)  # another process may just remove the folder, which it had made


def reason(error: Exception) -> str:
    """The text of an OSError without its number and path."""
    if isinstance(error, FileExistsError):
        return "it is a file"
    return error.strerror or str(error) if isinstance(error, OSError) else str(error)


def _part(file: Path) -> Path:
    return file.with_name(f"{file.name}.part")
