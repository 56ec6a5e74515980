"""A command that is one of a series: what the one that starts it tells it in the environment, and hears from it."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from subprocess import DEVNULL, run

TITLE = "BLOCKLOCAL_TITLE"  # which of the series it is
LAST_WORDS = "BLOCKLOCAL_LAST_WORDS"  # number of an open file for what went wrong, in place of standard error


@dataclass(frozen=True)
class Ended:
    """code: negative where a signal ended it. words: what it says went wrong."""

    code: int
    words: str

    @property
    def reason(self) -> str:
        return self.words or (f"killed by signal {-self.code}" if self.code < 0 else f"exit code {self.code}")


def call(command: Sequence[str], *, title: str) -> Ended:
    """Run a member, without its results."""
    with tempfile.TemporaryFile() as words:
        environment = {**os.environ, TITLE: title, LAST_WORDS: str(words.fileno())}
        code = run(command, stdout=DEVNULL, pass_fds=[words.fileno()], env=environment).returncode
        words.seek(0)
        return Ended(code, words.read().decode())


def title() -> str:
    """What a member says before its first line."""
    return f"{os.environ[TITLE]}: " if TITLE in os.environ else ""


def tell(message: str) -> bool:
    """Whether there was one to tell what went wrong."""
    if LAST_WORDS in os.environ:
        os.write(int(os.environ[LAST_WORDS]), message.encode())
    return LAST_WORDS in os.environ
