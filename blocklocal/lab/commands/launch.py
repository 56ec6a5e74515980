"""`bll launch`: starts a training run over several processes, watches them, and restarts them when one fails."""

from __future__ import annotations

import logging
import os
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from blocklocal.lab import outputs
from blocklocal.lab.arguments import parse_known
from blocklocal.lab.distributed.elastic_agent import ElasticAgent, Terminated, describe_failure
from blocklocal.lab.distributed.meeting import meet
from blocklocal.lab.distributed.process_group import loopback
from blocklocal.lab.distributed.rank_log import diverted
from blocklocal.lab.environment import find_interface
from blocklocal.lab.errors import UserError
from blocklocal.lab.ranges import Needs, Range
from blocklocal.lab.runs import lock
from blocklocal.lab.runs.checkpoints import resume_hint
from blocklocal.lab.runs.folder import Run
from blocklocal.lab.settings import Settings
from blocklocal.lab.training import rules
from blocklocal.lab.training.recipes import settings_from

# The code of a process. While it imports, it ends silently when it is interrupted or the launcher ends.
ENTRY = """
import ctypes, os, signal, sys
signal.signal(signal.SIGINT, signal.SIG_DFL)
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != {launcher}:
        sys.exit(1)
from blocklocal.__main__ import main
sys.exit(main())
"""


@dataclass(frozen=True)
class Options:
    """Train blocks over processes: bll launch [these options] [DATA] [options of bll train].

    Each process trains its own blocks, by default one. When a process dies or hangs, all of them restart from the last
    checkpoint. To use several machines, run the same command on each, with an --out folder that all of them share; a
    machine that joins later adds --resume.
    """

    processes: Annotated[int, Range(least=0, most=4096)] = 0
    """processes on this machine; 0: one per block and replica, spread over the machines"""
    nnodes: str = "1"
    """number of machines, or LEAST:MOST to continue when one is lost or joins"""
    rdzv_endpoint: Annotated[str, Needs("nnodes")] = ""
    """HOST:PORT where the machines meet, on one of them; needed for several machines"""
    interface: str = ""
    """network interface for the messages (default: the loopback of this machine); needed for several machines"""
    restarts: Annotated[int, Range(least=0)] = 3
    """how often to restart the processes after a failure"""

    @property
    def machines(self) -> tuple[int, int]:
        """The least and the most machines. UserError: not numbers."""
        numbers = re.fullmatch(r"(\d{1,5})(?::(\d{1,5}))?", self.nnodes, re.ASCII)
        if numbers is None or not 1 <= int(numbers[1]) <= int(numbers[2] or numbers[1]):
            raise UserError(f"--nnodes {self.nnodes}: write a number of machines, or LEAST:MOST")
        return int(numbers[1]), int(numbers[2] or numbers[1])

    def check(self) -> None:
        """Check the options. UserError: some do not go together."""
        _, most = self.machines
        if most > 1 and not (self.rdzv_endpoint and self.interface):
            raise UserError(
                f"--nnodes {self.nnodes} needs --rdzv-endpoint HOST:PORT, where the machines meet, and --interface, "
                "through which they reach each other"
            )
        if self.interface:
            find_interface(self.interface)


def main(args: Sequence[str]) -> None:
    if {"-h", "--help"} & set(args):
        with suppress(SystemExit):
            parse_known(Options, ["--help"], prog="bll launch")
        settings_from(["--help"])  # prints the other options and exits
    options, rest = parse_known(Options, args, prog="bll launch")
    options.check()
    settings = settings_from(rest)
    settings.check()
    rules.check_over_processes(settings.rule)
    run = Run(settings.folder)
    if settings.resume:
        run.records()  # checked before anything is started
    else:
        run.refuse()
    processes = options.processes or max(1, _parts(settings) // options.machines[1])
    _set_environment(options, processes=processes)
    command = [sys.executable, "-c", ENTRY.format(launcher=os.getpid()), "train", *rest]
    with (
        _silence(),
        outputs.room(run.path, flag="--out"),
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name,  # a rendezvous may still write there
    ):
        folder = Path(name)
        try:
            with diverted(folder / "below.log") as console:
                rendezvous = meet(options.rdzv_endpoint, machines=options.machines, processes=processes, folder=folder)
                failure = ElasticAgent(
                    command,
                    processes=processes,
                    rendezvous=rendezvous,
                    restarts=options.restarts,
                    run=run,
                    folder=folder,
                    console=console,
                ).run()
        except KeyboardInterrupt:
            raise KeyboardInterrupt(resume_hint(run) if run.exists else "") from None
        except Terminated as error:
            sys.exit(128 + error.number)
        finally:
            lock.clear(run.path)
    if failure and failure.code == 2:
        raise UserError(failure.message)
    if failure:
        sys.stderr.write(failure.trace)
        raise OSError(f"{describe_failure(failure, run)}; {resume_hint(run) if run.exists else 'nothing was begun'}")


@contextmanager
def _silence() -> Iterator[None]:
    """Silence the loggers of torch, each of which has its own level: the launcher reports the same itself."""
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


def _parts(settings: Settings) -> int:
    """The number of processes that there is work for: one per block and replica."""
    return settings.replicas * (len(settings.at) + 1 if settings.at else settings.blocks)


def _set_environment(options: Options, *, processes: int) -> None:
    """Set the environment that the processes inherit."""
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    os.environ["GLOO_SOCKET_IFNAME"] = os.environ["NCCL_SOCKET_IFNAME"] = options.interface or loopback()
    os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1")  # a process ends when another is gone
