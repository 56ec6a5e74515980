"""Commands that a sweep starts: what they are told through the environment, and what they report back."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass

TITLE = "BLOCKLOCAL_TITLE"  # which command of the sweep it is
ERROR_FD = "BLOCKLOCAL_ERROR_FD"  # number of an open file for the error message, instead of standard error


@dataclass(frozen=True)
class CommandResult:
    """How a command ended. code: negative if a signal ended it. message: its error message."""

    code: int
    message: str

    @property
    def reason(self) -> str:
        return self.message or (f"killed by signal {-self.code}" if self.code < 0 else f"exit code {self.code}")


def run(command: Sequence[str], *, title: str) -> CommandResult:
    """Run a command of a sweep without printing its output."""
    with tempfile.TemporaryFile() as file:
        environment = {**os.environ, TITLE: title, ERROR_FD: str(file.fileno())}
        code = subprocess.run(command, stdout=subprocess.DEVNULL, pass_fds=[file.fileno()], env=environment).returncode
        file.seek(0)
        return CommandResult(code, file.read().decode())


def title() -> str:
    """The prefix of the first line that a command of a sweep prints."""
    return f"{os.environ[TITLE]}: " if TITLE in os.environ else ""


def report_to_parent(message: str) -> bool:
    """Report an error message to the parent. Returns whether there is one that listens."""
    if ERROR_FD in os.environ:
        os.write(int(os.environ[ERROR_FD]), message.encode())
    return ERROR_FD in os.environ
