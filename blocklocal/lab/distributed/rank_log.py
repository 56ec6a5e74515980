"""The output of one process of several: rank 0 to the console, all others to a file; and why each one ended."""

from __future__ import annotations

import json
import os
import socket
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import StringIO
from pathlib import Path
from typing import NoReturn, TextIO

from blocklocal.lab.terminal import expendable

LAUNCHED = "BLOCKLOCAL_LAUNCHED"  # set by `bll launch`, which reads the reports of the processes that it starts
REPORT = "TORCHELASTIC_ERROR_FILE"  # where a launcher, torchrun too, looks for what a process failed of
LOGS = "logs"  # in the folder of a run: a file per process


def report(message: str, *, trace: str = "") -> None:
    """Tell the launcher, if there is one, why this process ends."""
    if REPORT in os.environ:
        Path(os.environ[REPORT]).write_text(
            json.dumps({"message": message, "trace": trace, "timestamp": str(int(time.time()))})
        )


class RankLog:
    """The log of one process. Output of ranks above 0 is kept until there is a file.

    Under `bll launch`, native libraries also write their output here.
    """

    def __init__(self, rank: int, *, size: int) -> None:
        self.rank, self.size = rank, size
        self.file: TextIO | None = None
        self.console = sys.__stderr__
        self.early = StringIO()
        self.below: TextIO | None = None
        if LAUNCHED in os.environ and self.console is not None:
            self.below = (Path(os.environ[REPORT]).parent / f"below{rank}.log").open("a+")
            self.console = sys.stderr = divert(self.below)
        if rank:
            sys.stdout = sys.stderr = self.early

    def open(self, run: Path) -> None:
        """Write to a file in the folder of the run from now on."""
        (run / LOGS).mkdir(parents=True, exist_ok=True)
        log = os.open(run / LOGS / f"rank{self.rank}.log", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        self.file = expendable(log, "a")
        now, host = time.strftime("%Y-%m-%d %H:%M:%S"), socket.gethostname()
        self.file.write(f"{now} rank {self.rank} of {self.size}, process {os.getpid()} on {host}\n")
        self.file.write(self.early.getvalue())
        if self.below is not None:
            self.below.seek(0)
            self.file.write(self.below.read())
            os.dup2(self.file.fileno(), 2)
        if self.rank:
            sys.stdout = sys.stderr = self.file

    def end(self, error: BaseException, *, code: int) -> NoReturn:
        """End this process at once, so that it does not wait for others, nor they for it.

        The launcher gets one line. The traceback of an unexpected error goes to the file or, if there is none yet, to
        the launcher, which knows which failure came first.
        """
        message = str(error) if code == 2 else f"{type(error).__name__}: {error}".split("\n")[0].rstrip(": ")
        told = code == 1 and (self.file or not isinstance(error, OSError))
        trace = "".join(traceback.format_exception(error)) if told else ""
        try:
            report(message, trace="" if self.file else trace)
            if LAUNCHED not in os.environ:
                print(f"bll: rank {self.rank}: {message}", file=self.console)
            if trace and (self.file or LAUNCHED not in os.environ):
                print(trace, file=self.file or self.console)
            for stream in (self.file, sys.__stdout__, self.console):
                if stream is not None:
                    stream.flush()
        finally:  # also where nothing can be written any more
            os._exit(code)


def divert(file: TextIO) -> TextIO:
    """Redirect what native libraries write to standard error to `file`; returns the former destination."""
    assert sys.__stderr__ is not None
    sys.__stderr__.flush()
    before = expendable(os.dup(2), "w", like=sys.__stderr__)
    os.dup2(file.fileno(), 2)
    return before


@contextmanager
def diverted(path: Path) -> Iterator[TextIO | None]:
    """Do so for a while; gives the former standard error, for Python and for new processes, or None if it is closed."""
    if sys.__stderr__ is None:
        yield None
        return
    with path.open("w") as file, divert(file) as console:
        python = sys.stderr
        sys.stderr = console if python is sys.__stderr__ else python
        try:
            yield console
        finally:
            with suppress(OSError):
                console.flush()
            os.dup2(console.fileno(), 2)
            sys.stderr = python
