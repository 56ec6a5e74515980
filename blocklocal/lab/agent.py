"""Watches the processes of a run on this machine: torch's own agent, with what it says and when it gives up."""

from __future__ import annotations

import contextlib
import os
import signal
from typing import Any

from rich.console import Console
from torch.distributed.elastic.agent.server.api import WorkerGroup, WorkerSpec
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from blocklocal.lab.journal import LAUNCHED, LOGS
from blocklocal.lab.processes import AGAIN, FIRST
from blocklocal.lab.runs import Run

GRACE = 3  # seconds that a process has to end by itself before it is killed


class Agent(LocalElasticAgent):
    """torch's own agent, which says in a line what has failed, and does not try again what cannot go better.

    `_monitor_workers`, `_start_workers` and `_remaining_restarts` are private to it; they are those of torch 2.13.
    """

    def __init__(self, spec: WorkerSpec, *, run: Run, folder: str) -> None:
        super().__init__(spec, DefaultLogsSpecs(log_dir=folder), shutdown_timeout=GRACE)
        self._run, self._console = run, Console(stderr=True)
        os.environ[LAUNCHED] = FIRST

    def _monitor_workers(self, worker_group: WorkerGroup) -> Any:  # pyright: ignore[reportIncompatibleVariableOverride]
        pids = [worker.id for worker in worker_group.workers]
        if any(map(_failed, pids)):
            for pid in pids:  # one that is stopped would not hear that it shall end
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)
        result: Any = super()._monitor_workers(worker_group)  # pyright: ignore[reportCallIssue]
        if result.failures and self._remaining_restarts:
            rank, failure = first(result.failures)
            if failure.exitcode == 2:  # unusable settings or data
                self._remaining_restarts = 0
            else:
                restart = self._worker_group.spec.max_restarts - self._remaining_restarts + 1
                self._say(
                    f"{tell(rank, failure, self._run)}; restart {restart} of {self._worker_group.spec.max_restarts}"
                )
        return result

    def _start_workers(self, worker_group: WorkerGroup) -> Any:  # pyright: ignore[reportIncompatibleVariableOverride]
        started: Any = super()._start_workers(worker_group)  # pyright: ignore[reportCallIssue]
        os.environ[LAUNCHED] = AGAIN
        return started

    def _say(self, line: str) -> None:
        self._console.print(f"bll: {line}", highlight=False, soft_wrap=True, markup=False)


def _failed(pid: int) -> bool:
    """Whether a child has ended otherwise than well; it stays to be asked by the agent."""
    with contextlib.suppress(ChildProcessError):
        ended = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        return ended is not None and ended.si_status != 0
    return False


def first(failures: dict[int, ProcessFailure]) -> tuple[int, ProcessFailure]:
    """What the others follow from: unusable settings, else a process that was killed, else the first to fail.

    The agent ends the rest with SIGTERM, and counts them among the failures.
    """

    def order(failure: tuple[int, ProcessFailure]) -> tuple[bool, bool, bool, int]:
        code = failure[1].exitcode
        return code != 2, code == -signal.SIGTERM, code >= 0, failure[1].timestamp

    return min(failures.items(), key=order)


def tell(rank: int, failure: ProcessFailure, run: Run) -> str:
    """What happened to a process, and where to read more."""
    if failure.exitcode < 0:
        return f"process {rank} was killed by {failure.signal_name()}"
    log = run.path / LOGS / f"rank{rank}.log"
    more = f" (see {log})" if log.exists() else ""
    return f"process {rank} failed: {failure.message}{more}"
