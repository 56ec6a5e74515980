"""A command that is one of a sweep: what the one that starts it tells it in the environment, and hears from it."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass

TITLE = "BLOCKLOCAL_TITLE"  # which of the sweep it is
ERROR_FD = "BLOCKLOCAL_ERROR_FD"  # number of an open file for what went wrong, in place of standard error


@dataclass(frozen=True)
class CommandResult:
    """code: negative where a signal ended it. message: what it says went wrong."""

    code: int
    message: str

    @property
    def reason(self) -> str:
        return self.message or (f"killed by signal {-self.code}" if self.code < 0 else f"exit code {self.code}")


def run(command: Sequence[str], *, title: str) -> CommandResult:
    """Run a command of a sweep, without what it prints."""
    with tempfile.TemporaryFile() as file:
        environment = {**os.environ, TITLE: title, ERROR_FD: str(file.fileno())}
        code = subprocess.run(command, stdout=subprocess.DEVNULL, pass_fds=[file.fileno()], env=environment).returncode
        file.seek(0)
        return CommandResult(code, file.read().decode())


def title() -> str:
    """What such a command says before its first line."""
    return f"{os.environ[TITLE]}: " if TITLE in os.environ else ""


def report_to_parent(message: str) -> bool:
    """Whether there was one to tell what went wrong."""
    if ERROR_FD in os.environ:
        os.write(int(os.environ[ERROR_FD]), message.encode())
    return ERROR_FD in os.environ
