"""What one process of several says: rank 0 to the console, every other one to a file; and the last words of each."""

from __future__ import annotations

import json
import os
import socket
import sys
import time
import traceback
from io import StringIO
from pathlib import Path
from typing import NoReturn, TextIO

LAUNCHED = "BLOCKLOCAL_LAUNCHED"  # set by `bll launch`, which reads the reports of the processes that it starts
LOGS = "logs"  # in the folder of a run: a file per process


def report(message: str) -> None:
    """Tell torch's agent, where this process is one of its, why it ends."""
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file:
        Path(file).write_text(json.dumps({"message": message, "timestamp": str(int(time.time()))}))


class Journal:
    """Of one process. What a rank above 0 says before there is a file is kept for it."""

    def __init__(self, rank: int, *, size: int) -> None:
        self.rank, self.size = rank, size
        self.file: TextIO | None = None
        self.early = StringIO()
        if rank:
            sys.stdout = sys.stderr = self.early

    def open(self, run: Path) -> None:
        """From now on there is a file in the folder of the run."""
        (run / LOGS).mkdir(parents=True, exist_ok=True)
        self.file = (run / LOGS / f"rank{self.rank}.log").open("a", buffering=1)
        now, host = time.strftime("%Y-%m-%d %H:%M:%S"), socket.gethostname()
        self.file.write(f"{now} rank {self.rank} of {self.size}, process {os.getpid()} on {host}\n")
        self.file.write(self.early.getvalue())
        if self.rank:
            sys.stdout = sys.stderr = self.file

    def end(self, error: BaseException, *, code: int) -> NoReturn:
        """End this process at once: it shall not wait for others, nor they for it.

        The launcher gets a line. The traceback of what nobody expected goes to the file.
        """
        message = str(error) if code == 2 else f"{type(error).__name__}: {error}".split("\n")[0].rstrip(": ")
        if code == 1:
            traceback.print_exception(error, file=self.file or sys.__stderr__)
        report(message)
        if LAUNCHED not in os.environ:
            print(f"bll: rank {self.rank}: {message}", file=sys.__stderr__)
        for stream in (self.file, sys.__stdout__, sys.__stderr__):
            if stream is not None:
                stream.flush()
        os._exit(code)
