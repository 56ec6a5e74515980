"""`bll launch`: a training run over several processes, which it starts, watches and starts again when one fails."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import signal
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import tyro
from rich.console import Console
from torch.distributed.elastic.agent.server.api import WorkerGroup, WorkerSpec
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure
from torch.distributed.elastic.rendezvous import RendezvousParameters, registry

from blocklocal.lab.arguments import parse
from blocklocal.lab.checkpoints import kept
from blocklocal.lab.config import Settings
from blocklocal.lab.errors import UserError
from blocklocal.lab.processes import LOGS, STORE, loopback
from blocklocal.lab.runs import Run
from blocklocal.lab.train import settings_from

GRACE = 3  # seconds that a process has to end by itself before it is killed
POLL = 0.1  # seconds between two looks at the processes


@dataclass(frozen=True)
class Options:
    """Train blocks over processes: bll launch [these options] [DATA] [options of bll train].

    Each process trains its own blocks, by default one. When a process dies or hangs, all of them start again from the
    last checkpoint. Several machines need a folder for --out that all of them see, and call the same command.
    """

    processes: int = 0
    """processes on this machine; 0: one per block, spread over the machines"""
    nnodes: str = "1"
    """number of machines, or LEAST:MOST"""
    rdzv_endpoint: str = ""
    """HOST:PORT where the machines meet, HOST being one of them; needed for several"""
    interface: str = ""
    """network interface for the messages (default: the loopback of this machine); needed for several machines"""
    restarts: int = 3
    """so many times the processes are started again"""

    @property
    def machines(self) -> tuple[int, int]:
        """The least and the most. UserError: no numbers."""
        least, _, most = self.nnodes.partition(":")
        if not least.isdecimal() or not (most or least).isdecimal() or not 1 <= int(least) <= int(most or least):
            raise UserError(f"--nnodes {self.nnodes}: a number of machines, or LEAST:MOST")
        return int(least), int(most or least)

    def check(self) -> None:
        """UserError: what does not go together."""
        _, most = self.machines
        if self.processes < 0 or self.restarts < 0:
            raise UserError(f"--processes {self.processes}, --restarts {self.restarts}: 0 or more")
        if most > 1 and not (self.rdzv_endpoint and self.interface):
            raise UserError(
                f"--nnodes {self.nnodes} needs --rdzv-endpoint HOST:PORT, where the machines meet, and --interface, "
                "by which they reach each other"
            )


def main(args: Sequence[str]) -> None:
    options, rest = _split(args)
    options.check()
    settings = settings_from(rest)
    settings.check()
    run = Run(settings.folder)
    if run.exists and not settings.resume:
        raise UserError(
            f"{str(run.path)!r} already holds a run: go on with --resume, or choose another folder with --out"
        )
    processes = options.processes or max(1, _blocks(settings) // options.machines[0])
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # it tells what is said here
    with tempfile.TemporaryDirectory() as folder:
        _set_environment(options, processes=processes, store=folder)
        agent = Agent(_workers(options, rest, processes=processes, folder=folder), run=run, folder=folder)
        try:
            result: Any = agent.run()
        except SignalException as error:
            if error.sigval == signal.SIGINT:
                raise KeyboardInterrupt(kept(run) if run.exists else "") from None
            sys.exit(128 + error.sigval)
    if result.is_failed():
        rank, failure = first(result.failures)
        if failure.exitcode == 2:
            raise UserError(failure.message)
        raise OSError(f"{tell(rank, failure, run)}; {kept(run) if run.exists else 'nothing was begun'}")


class Agent(LocalElasticAgent):
    """torch's own agent, which says in a line what has failed, and does not try again what cannot go better."""

    def __init__(self, spec: WorkerSpec, *, run: Run, folder: str) -> None:
        super().__init__(spec, DefaultLogsSpecs(log_dir=folder), shutdown_timeout=GRACE)
        self._run, self._console = run, Console(stderr=True)

    def _monitor_workers(self, worker_group: WorkerGroup) -> Any:  # pyright: ignore[reportIncompatibleVariableOverride]
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

    def _say(self, line: str) -> None:
        self._console.print(f"bll: {line}", highlight=False, soft_wrap=True, markup=False)


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


def _split(args: Sequence[str]) -> tuple[Options, list[str]]:
    """The options of `bll launch`, and the rest for `bll train`."""
    if {"-h", "--help"} & set(args):
        parse(Options, ["--help"], prog="bll launch")
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.cli(Options, args=list(args), prog="bll launch", return_unknown_args=True)
    except SystemExit:
        parse(Options, args, prog="bll launch")  # says what is wrong
        raise


def _blocks(settings: Settings) -> int:
    return len(settings.at) + 1 if settings.at else settings.blocks


def _set_environment(options: Options, *, processes: int, store: str) -> None:
    """What the processes inherit."""
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    os.environ["GLOO_SOCKET_IFNAME"] = os.environ["NCCL_SOCKET_IFNAME"] = options.interface or loopback()
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # else a restart meets at a store that is gone
    if options.machines == (1, 1):
        os.environ[STORE] = store


def _workers(options: Options, rest: list[str], *, processes: int, folder: str) -> WorkerSpec:
    """One machine meets in a file, so that nothing listens at a port; several at the endpoint."""
    least, most = options.machines
    place = {"endpoint": options.rdzv_endpoint} if most > 1 else {"endpoint": f"{folder}/meeting", "store_type": "file"}
    local = {"local_addr": "127.0.0.1"} if most == 1 else {}
    parameters = RendezvousParameters(
        backend="c10d", run_id="blocklocal", min_nodes=least, max_nodes=most, **place, **local
    )
    return WorkerSpec(
        role="blocks",
        local_world_size=processes,
        entrypoint=sys.executable,
        args=("-m", "blocklocal", "train", *rest),
        rdzv_handler=registry.get_rendezvous_handler(parameters),
        max_restarts=options.restarts,
        monitor_interval=POLL,
        local_addr=local.get("local_addr"),
    )
