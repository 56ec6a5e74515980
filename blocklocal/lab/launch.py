"""`bll launch`: a training run over several processes, which it starts, watches and starts again when one fails."""

from __future__ import annotations

import logging
import os
import re
import signal
import socket
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Annotated, Any

from torch.distributed.elastic.agent.server.api import WorkerSpec
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.rendezvous import RendezvousParameters, registry
from torch.distributed.elastic.rendezvous.api import RendezvousError

from blocklocal.lab import rules
from blocklocal.lab.agent import Agent, first, tell
from blocklocal.lab.arguments import parse_known
from blocklocal.lab.checkpoints import kept
from blocklocal.lab.config import Settings
from blocklocal.lab.environment import find_interface
from blocklocal.lab.errors import UserError
from blocklocal.lab.processes import STORE, loopback
from blocklocal.lab.ranges import Needs, Range
from blocklocal.lab.recipes import settings_from
from blocklocal.lab.runs import Run

# What a process runs. While it imports, an interruption is a silent end, and so is that of the launcher.
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
POLL = 0.1  # seconds between two looks at the processes


@dataclass(frozen=True)
class Options:
    """Train blocks over processes: bll launch [these options] [DATA] [options of bll train].

    Each process trains its own blocks, by default one. When a process dies or hangs, all of them start again from the
    last checkpoint. Several machines need a folder for --out that all of them see, and call the same command; one that
    joins later adds --resume.
    """

    processes: Annotated[int, Range(least=0, most=4096)] = 0
    """processes on this machine; 0: one per block and replica, spread over the machines"""
    nnodes: str = "1"
    """number of machines, or LEAST:MOST to go on when one is lost or joins"""
    rdzv_endpoint: Annotated[str, Needs("nnodes")] = ""
    """HOST:PORT where the machines meet, HOST being one of them; needed for several"""
    interface: str = ""
    """network interface for the messages (default: the loopback of this machine); needed for several machines"""
    restarts: Annotated[int, Range(least=0)] = 3
    """so many times the processes are started again"""

    @property
    def machines(self) -> tuple[int, int]:
        """The least and the most. UserError: no numbers."""
        numbers = re.fullmatch(r"(\d{1,5})(?::(\d{1,5}))?", self.nnodes, re.ASCII)
        if numbers is None or not 1 <= int(numbers[1]) <= int(numbers[2] or numbers[1]):
            raise UserError(f"--nnodes {self.nnodes}: a number of machines, or LEAST:MOST")
        return int(numbers[1]), int(numbers[2] or numbers[1])

    def check(self) -> None:
        """UserError: what does not go together."""
        _, most = self.machines
        if most > 1 and not (self.rdzv_endpoint and self.interface):
            raise UserError(
                f"--nnodes {self.nnodes} needs --rdzv-endpoint HOST:PORT, where the machines meet, and --interface, "
                "by which they reach each other"
            )
        if self.interface:
            find_interface(self.interface)


def main(args: Sequence[str]) -> None:
    if {"-h", "--help"} & set(args):
        with suppress(SystemExit):
            parse_known(Options, ["--help"], prog="bll launch")
        settings_from(["--help"])  # the rest of the options, and the end
    options, rest = parse_known(Options, args, prog="bll launch")
    options.check()
    settings = settings_from(rest)
    settings.check()
    rules.check_over_processes(settings.rule)
    run = Run(settings.folder)
    if run.exists and not settings.resume:
        raise UserError(
            f"{str(run.path)!r} already holds a run: go on with --resume, or choose another folder with --out"
        )
    processes = options.processes or max(1, _parts(settings) // options.machines[1])
    with (
        _silence(),
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder,  # the meeting may leave a last word there
    ):
        _set_environment(options, processes=processes, store=folder)
        try:
            workers = _workers(options, rest, processes=processes, folder=folder)
            result: Any = Agent(workers, run=run, folder=folder).run()
            workers.rdzv_handler.shutdown()
        except RendezvousError as error:
            raise UserError(f"the machines did not meet at {options.rdzv_endpoint}: {error}") from error
        except SignalException as error:
            if error.sigval == signal.SIGINT:
                raise KeyboardInterrupt(kept(run) if run.exists else "") from None
            sys.exit(128 + error.sigval)
    if result.is_failed():
        rank, failure = first(result.failures)
        if failure.exitcode == 2:
            raise UserError(failure.message)
        raise OSError(f"{tell(rank, failure, run)}; {kept(run) if run.exists else 'nothing was begun'}")


@contextmanager
def _silence() -> Iterator[None]:
    """Nothing from the loggers of torch, each of which has a level of its own: what they tell is said here."""
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


def _parts(settings: Settings) -> int:
    """So many processes are there work for: one per block and replica."""
    return settings.replicas * (len(settings.at) + 1 if settings.at else settings.blocks)


def _set_environment(options: Options, *, processes: int, store: str) -> None:
    """What the processes inherit."""
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    os.environ["GLOO_SOCKET_IFNAME"] = os.environ["NCCL_SOCKET_IFNAME"] = options.interface or loopback()
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")  # nor a line of its runtime below the one that is said
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # else a restart meets at a store that is gone
    if options.machines == (1, 1):
        os.environ[STORE] = store


def _workers(options: Options, rest: list[str], *, processes: int, folder: str) -> WorkerSpec:
    """One machine meets in a file, so that nothing listens at a port; several at the endpoint."""
    least, most = options.machines
    if most == 1:
        address, place = "127.0.0.1", {"endpoint": f"{folder}/meeting", "store_type": "file"}
    else:
        address, hosts = _address(options.rdzv_endpoint)
        place = {"endpoint": options.rdzv_endpoint, "is_host": str(hosts).lower()}
    parameters = RendezvousParameters(
        backend="c10d", run_id="blocklocal", min_nodes=least, max_nodes=most, local_addr=address, **place
    )
    return WorkerSpec(
        role="blocks",
        local_world_size=processes,
        entrypoint=sys.executable,
        args=("-c", ENTRY.format(launcher=os.getpid()), "train", *rest),
        rdzv_handler=registry.get_rendezvous_handler(parameters),
        max_restarts=options.restarts,
        monitor_interval=POLL,
        local_addr=address,
    )


def _address(endpoint: str) -> tuple[str, bool]:
    """The address by which the endpoint reaches this machine, and whether the machines meet here.

    UserError: no HOST:PORT, or an unknown host.
    """
    host, _, port = endpoint.rpartition(":")
    if not host or not re.fullmatch(r"\d{1,5}", port, re.ASCII) or not 1 <= int(port) <= 65535:
        raise UserError(f"--rdzv-endpoint {endpoint}: HOST:PORT is needed, with a port from 1 to 65535")
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as way:
            way.connect((host, int(port)))
            address = way.getsockname()[0]
    except (OSError, UnicodeError) as error:
        raise UserError(f"--rdzv-endpoint {endpoint}: there is no way to that host ({error})") from error
    with socket.socket() as place:
        try:
            place.bind((host, int(port)))
        except OSError:  # another machine's address, or another launcher of this one is there already
            return address, False
    return address, True
