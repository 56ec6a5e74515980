"""`bll launch`: a training run over several processes, which it starts, watches and starts again when one fails."""

from __future__ import annotations

import logging
import os
import socket
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from blocklocal.lab import lock, outputs
from blocklocal.lab.agent import Agent, Ended, tell
from blocklocal.lab.arguments import parse_known
from blocklocal.lab.checkpoints import kept
from blocklocal.lab.config import Settings
from blocklocal.lab.errors import UserError
from blocklocal.lab.journal import diverted
from blocklocal.lab.meeting import Alone, Endpoint, Meeting
from blocklocal.lab.processes import loopback
from blocklocal.lab.recipes import settings_from
from blocklocal.lab.runs import Run


@dataclass(frozen=True)
class Options:
    """Train blocks over processes: bll launch [these options] [DATA] [options of bll train].

    Each process trains its own blocks, by default one. When a process dies or hangs, all of them start again from the
    last checkpoint. Several machines need a folder for --out that all of them see, and call the same command; one that
    joins later adds --resume.
    """

    processes: int = 0
    """processes on this machine; 0: one per block and replica, spread over the machines"""
    nnodes: str = "1"
    """number of machines, or LEAST:MOST to go on when one is lost or joins"""
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
    if {"-h", "--help"} & set(args):
        with suppress(SystemExit):
            parse_known(Options, ["--help"], prog="bll launch")
        settings_from(["--help"])  # the rest of the options, and the end
    options, rest = parse_known(Options, args, prog="bll launch")
    options.check()
    settings = settings_from(rest)
    settings.check()
    run = Run(settings.folder)
    if settings.resume:
        run.records()  # before anything is started
    else:
        run.refuse()
    processes = options.processes or max(1, _parts(settings) // options.machines[1])
    _set_environment(options, processes=processes)
    command = [sys.executable, "-m", "blocklocal", "train", *rest]
    with (
        outputs.room(run.path, flag="--out"),
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name,  # a meeting may leave a last word there
    ):
        folder = Path(name)
        try:
            with diverted(folder / "below.log") as console:
                meeting = _meeting(options, processes=processes, folder=folder)
                failure = Agent(
                    command,
                    processes=processes,
                    meeting=meeting,
                    restarts=options.restarts,
                    run=run,
                    folder=folder,
                    console=console,
                ).run()
        except KeyboardInterrupt:
            raise KeyboardInterrupt(kept(run) if run.exists else "") from None
        except Ended as error:
            sys.exit(128 + error.number)
        finally:
            lock.clear(run.path)
    if failure and failure.code == 2:
        raise UserError(failure.message)
    if failure:
        raise OSError(f"{tell(failure, run)}; {kept(run) if run.exists else 'nothing was begun'}")


def _parts(settings: Settings) -> int:
    """So many processes are there work for: one per block and replica."""
    return settings.replicas * (len(settings.at) + 1 if settings.at else settings.blocks)


def _set_environment(options: Options, *, processes: int) -> None:
    """What the processes inherit."""
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    os.environ["GLOO_SOCKET_IFNAME"] = os.environ["NCCL_SOCKET_IFNAME"] = options.interface or loopback()
    os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1")  # a process ends when another is gone


def _meeting(options: Options, *, processes: int, folder: Path) -> Meeting:
    """UserError: nobody answers at the endpoint."""
    if options.machines == (1, 1):
        return Alone(processes=processes, folder=folder)
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # it tells what is said here
    address, hosts = _address(options.rdzv_endpoint)
    print(f"bll: meeting at {options.rdzv_endpoint}, {options.nnodes} machines", file=sys.stderr)
    try:
        return Endpoint(
            options.rdzv_endpoint, processes=processes, machines=options.machines, address=address, hosts=hosts
        )
    except OSError as error:
        raise UserError(f"--rdzv-endpoint {options.rdzv_endpoint}: {error}") from error


def _address(endpoint: str) -> tuple[str, bool]:
    """The address by which the endpoint reaches this machine, and whether the machines meet here.

    UserError: no HOST:PORT, or an unknown host.
    """
    host, _, port = endpoint.rpartition(":")
    if not host or not port.isdecimal():
        raise UserError(f"--rdzv-endpoint {endpoint}: HOST:PORT is needed")
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as way:
            way.connect((host, int(port)))
            address = way.getsockname()[0]
    except OSError as error:
        raise UserError(f"--rdzv-endpoint {endpoint}: there is no way to that host ({error})") from error
    with socket.socket() as place:
        try:
            place.bind((host, int(port)))
        except OSError:  # another machine's address, or another launcher of this one is there already
            return address, False
    return address, True
