"""The processes that a launcher starts on its machine, each in its own session, and why they ended."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self, TextIO

from blocklocal.lab.distributed.process_group import PARENT
from blocklocal.lab.distributed.rank_log import LAUNCHED, REPORT

GRACE = 3  # seconds that a process has to end by itself before it is killed


@dataclass(frozen=True)
class Failure:
    """The failure of one process. code: its exit code, or the negative number of the signal that killed it.

    message: what it reported, or the name of the signal. seconds: when, in seconds since 1970. trace: the traceback of
    an unexpected error, if it is in no log.
    """

    rank: int
    code: int
    message: str
    seconds: float
    trace: str = ""


class Children:
    """Runs `command` in one process per rank during a `with` block, which none of them outlives.

    size: number of processes on all machines. environment: what they get besides their rank. launched: first or again.
    folder: a new one, for their reports. console: their standard error, if not this process's.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        ranks: Sequence[int],
        size: int,
        environment: dict[str, str],
        launched: str,
        folder: Path,
        console: TextIO | None = None,
    ) -> None:
        folder.mkdir()
        self._console = console
        self._command, self._ranks, self._folder = command, ranks, folder
        self._environment = environment | {
            "WORLD_SIZE": str(size),
            "LOCAL_WORLD_SIZE": str(len(ranks)),
            LAUNCHED: launched,
            PARENT: str(os.getpid()),
        }
        self._processes: list[subprocess.Popen[bytes]] = []
        self._ends: dict[int, float] = {}  # when each was first seen to have ended
        self._told: set[int] = set()  # ranks that were told to end

    def __enter__(self) -> Self:
        try:
            for place, rank in enumerate(self._ranks):
                own = {"RANK": str(rank), "LOCAL_RANK": str(place), REPORT: str(self._report(rank))}
                environment = os.environ | self._environment | own
                self._processes.append(
                    subprocess.Popen(self._command, env=environment, stderr=self._console, start_new_session=True)
                )
        except BaseException:
            self._end(signal.SIGTERM)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        self._end(signal.SIGINT if kind is KeyboardInterrupt else signal.SIGTERM)

    def codes(self) -> list[int | None]:
        """The exit code of each process; None while it runs."""
        codes = [process.poll() for process in self._processes]
        for rank, code in zip(self._ranks, codes, strict=False):  # some may not have been started
            if code is not None:
                self._ends.setdefault(rank, time.time())
        return codes

    def failure(self) -> Failure | None:
        """The failure that caused the others: unusable settings, else a killed process, else the first to fail.

        Never one of the processes that were still running and were killed here.
        """

        def order(failure: Failure) -> tuple[bool, bool, float]:
            return failure.code != 2, failure.code >= 0, failure.seconds

        codes = zip(self._ranks, self.codes(), strict=True)
        failures = [self._read(rank, code) for rank, code in codes if code and (code > 0 or rank not in self._told)]
        return min(failures, key=order, default=None)

    def _read(self, rank: int, code: int) -> Failure:
        report, end = self._report(rank), self._ends[rank]
        if code < 0:
            named = -code in set(signal.Signals)
            return Failure(rank, code, signal.Signals(-code).name if named else f"signal {-code}", end)
        try:
            said = json.loads(report.read_text())
            return Failure(rank, code, str(said["message"]), report.stat().st_mtime, str(said.get("trace", "")))
        except (OSError, ValueError, TypeError, KeyError):  # it ended before it could report
            return Failure(rank, code, f"exit code {code}", end)

    def _report(self, rank: int) -> Path:
        return self._folder / f"rank{rank}.json"

    def _end(self, number: int) -> None:
        """End all processes with this signal, and after a while with one that cannot be caught."""
        try:
            self._signal(number)
            self._signal(signal.SIGCONT)  # a stopped process would not react to the signal
            self._wait()
        finally:
            self._signal(signal.SIGKILL)
            self._wait()  # not for ever: a process may be stuck in the kernel

    def _signal(self, number: int) -> None:
        for rank, process in zip(self._ranks, self._processes, strict=False):
            if process.poll() is None:
                self._told.add(rank)
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, number)

    def _wait(self) -> None:
        end = time.monotonic() + GRACE
        while None in self.codes() and time.monotonic() < end:
            time.sleep(0.01)
