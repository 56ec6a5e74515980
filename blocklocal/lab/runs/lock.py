"""A lock, so that only one process writes in a folder. The system releases it when the process ends in any way."""

from __future__ import annotations

import fcntl
import os
import re
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from blocklocal.lab.errors import UserError
from blocklocal.lab.outputs import reason, room

FILE = ".lock"  # says who holds the folder; it is gone at the end, unless the process is killed
POLL = 0.02  # seconds between two tries
MOMENT = 1.0  # seconds that a process may need to end after it was killed


@contextmanager
def alone(folder: Path, *, flag: str = "--out", timeout: float = MOMENT) -> Iterator[None]:
    """Hold the lock of a folder, see `room`. UserError: another process still holds it after `timeout` seconds."""
    end = time.monotonic() + timeout
    with room(folder, flag=flag):
        while (lock := _acquire(folder, flag=flag)) is None:
            if time.monotonic() > end:
                raise UserError(
                    f"{str(folder)!r} is in use by {holder(folder)}: wait until it ends, or choose another {flag}"
                )
            time.sleep(POLL)
        try:
            os.ftruncate(lock, 0)
            os.write(lock, f"process {os.getpid()} on {socket.gethostname()}".encode())
            yield
        finally:
            (folder / FILE).unlink(missing_ok=True)
            os.close(lock)


def clear(folder: Path) -> None:
    """Remove the file left by a killed process."""
    with suppress(UserError), alone(folder, timeout=0.0):
        pass


def is_held(folder: Path) -> bool:
    """Whether a process holds the folder now."""
    try:
        lock = os.open(folder / FILE, os.O_RDWR)
    except OSError:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(lock)
    return False


def holder(folder: Path) -> str:
    """The process that holds the folder, according to the lock file."""
    try:
        said = (folder / FILE).read_text(errors="replace")
    except OSError:
        said = ""
    return said if re.fullmatch(r"process \d+ on [\w.-]+", said) else "another process"


def _acquire(folder: Path, *, flag: str) -> int | None:
    """A descriptor that holds the lock; None if another process has it, or has just removed its file."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder / FILE, os.O_RDWR | os.O_CREAT, 0o666)
    except (FileExistsError, FileNotFoundError):
        return None
    except OSError as error:
        raise UserError(f"{flag} {str(folder)!r} cannot be written to ({reason(error)})") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(lock), os.stat(folder / FILE)):
            return lock
    except (BlockingIOError, FileNotFoundError):
        pass
    except OSError as error:
        os.close(lock)
        raise UserError(f"{flag} {str(folder)!r} cannot be locked ({reason(error)})") from error
    os.close(lock)
    return None
