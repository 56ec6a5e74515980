"""Starts the processes of a run on this machine, watches them, reports failures, and restarts all of them."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from blocklocal.lab.distributed.process_group import AGAIN, FIRST
from blocklocal.lab.distributed.rank_log import LOGS
from blocklocal.lab.distributed.rendezvous import Rendezvous
from blocklocal.lab.distributed.workers import Children, Failure
from blocklocal.lab.runs.folder import Run

POLL = 0.1  # seconds between checks of the processes


class Terminated(Exception):
    """The launcher got a signal to end."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = signal.Signals(number)


class ElasticAgent:
    """Runs `command` in a number of processes on this machine, and restarts them after a failure.

    restarts: how often, at most. folder: for the reports of the processes. console: their standard error, if not this
    process's.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        processes: int,
        rendezvous: Rendezvous,
        restarts: int,
        run: Run,
        folder: Path,
        console: TextIO | None = None,
    ) -> None:
        self._command, self._processes, self._rendezvous = command, processes, rendezvous
        self._restarts, self._run, self._folder = restarts, run, folder
        self._failed, self._starts = 0, 0
        self._console = console

    def run(self) -> Failure | None:
        """Run until all processes of all machines have succeeded, or one has failed for good; returns that failure.

        OSError: see `Rendezvous`. Terminated, KeyboardInterrupt: a signal. No process is left behind in any case.
        """
        with _signals():
            while True:
                failure = self._start()
                if failure is None or failure.code == 2 or self._failed == self._restarts:  # 2: unusable settings
                    self._rendezvous.close()
                    return failure
                self._failed += 1
                self._say(f"{describe_failure(failure, self._run)}; restart {self._failed} of {self._restarts}")

    def _start(self) -> Failure | None:
        """Run the processes until all have ended or one has failed; None if all have succeeded."""
        while True:
            place = self._rendezvous.join()
            with Children(
                self._command,
                ranks=range(place.first, place.first + self._processes),
                size=place.size,
                environment=place.environment,
                launched=AGAIN if self._starts else FIRST,
                folder=self._folder / f"start{self._starts}",
                console=self._console,
            ) as children:
                self._starts += 1
                ended = self._watch(children)
            if ended:
                return children.failure()

    def _watch(self, children: Children) -> bool:
        """Wait until the processes have ended (True), or another machine joins and all must restart (False)."""
        while True:
            time.sleep(POLL)
            codes = children.codes()
            if any(codes) or (all(code == 0 for code in codes) and self._rendezvous.done()):
                return True
            if self._rendezvous.changed():
                return False

    def _say(self, line: str) -> None:
        print(f"bll: {line}", file=sys.stderr)


def describe_failure(failure: Failure, run: Run) -> str:
    """What happened to a process, and where to read more."""
    if failure.code < 0:
        return f"process {failure.rank} was killed by {failure.message}"
    log = run.path / LOGS / f"rank{failure.rank}.log"
    more = f" (see {log})" if log.exists() else ""
    return f"process {failure.rank} failed: {failure.message}{more}"


@contextmanager
def _signals() -> Iterator[None]:
    """Signals that would end this process raise Terminated instead, except those that it inherited as ignored."""

    def end(number: int, _: object) -> None:
        raise Terminated(number)

    numbers = (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
    before = {number: signal.getsignal(number) for number in numbers}
    for number in numbers:
        if before[number] is not signal.SIG_IGN:
            signal.signal(number, end)
    try:
        yield
    finally:
        for number in numbers:
            signal.signal(number, before[number])
