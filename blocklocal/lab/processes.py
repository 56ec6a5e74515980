"""The processes of a run: how this one joins the others, what they add up, and how it reports when it fails."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from io import StringIO
from pathlib import Path
from typing import TextIO

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import FileStore

from blocklocal.lab.errors import UserError

# Set by `bll launch` for the processes that it starts.
STORE = "BLOCKLOCAL_STORE"  # folder in which the processes of one machine meet, instead of at a port
LAUNCHED = "BLOCKLOCAL_LAUNCHED"  # whether they are the first, or go on where others were: one of the next two
FIRST, AGAIN = "first", "again"

LOGS = "logs"  # in the folder of a run: a file per process


@dataclass(frozen=True)
class Processes:
    """This process among those of a run. group: for what all of them add up; None where there is no other way but one.

    All of them call the same methods in the same order.
    """

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None

    @property
    def distributed(self) -> bool:
        """Whether the run was started as a group of processes, be it of one."""
        return self.group is not None

    @property
    def restarted(self) -> bool:
        """Whether others have been here before, in the same run."""
        return os.environ.get(LAUNCHED) == AGAIN or int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0

    def sum(self, values: Tensor) -> Tensor:
        """Over all processes, the same tensor on each; a tensor that is zero on the others passes as it is."""
        if self.group is not None:
            dist.all_reduce(values := values.clone(), group=self.group)
        return values

    def largest(self, value: float) -> float:
        if self.group is not None:
            dist.all_reduce(values := torch.tensor(value, dtype=torch.float64), op=dist.ReduceOp.MAX, group=self.group)
            value = values.item()
        return value

    def first(self, value: int) -> int:
        """The number that rank 0 has."""
        return int(self.sum(torch.tensor(value if self.rank == 0 else 0)))

    def meet(self) -> None:
        """Wait for all."""
        self.sum(torch.zeros(()))

    def log_to(self, folder: Path) -> None:
        """From now on what this process says goes to its file in `folder`; rank 0 alone speaks to the console."""
        if not self.distributed:
            return
        (folder / LOGS).mkdir(parents=True, exist_ok=True)
        log = (folder / LOGS / f"rank{self.rank}.log").open("a", buffering=1)
        log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} rank {self.rank} of {self.size}, ")
        log.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        _failures.log = log
        if self.rank:
            log.write(_said(sys.stderr))
            sys.stdout = sys.stderr = log


@dataclass
class _Failures:
    """Where the traceback of what fails goes."""

    log: TextIO | None = None


_failures = _Failures()


@contextmanager
def joined(*, device: torch.device, patience: float) -> Iterator[Processes]:
    """This process in its group, if it was started as one of several; they end together, whatever happens.

    patience: seconds after which a process that does not answer is given up.
    """
    if "RANK" not in os.environ:
        yield Processes()
        return
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if rank:
        sys.stdout = sys.stderr = StringIO()
    try:
        _die_with_parent()
        timeout = timedelta(seconds=patience)
        _join(rank, size, device=device, timeout=timeout)
        group = dist.new_group(backend="gloo", timeout=timeout)
        assert isinstance(group, dist.ProcessGroup)
        yield Processes(rank, size, group)
        dist.destroy_process_group()
    except UserError as error:
        _leave(rank, str(error), code=2)
    except KeyboardInterrupt:
        _leave(rank, "interrupted", code=130)
    except Exception as error:
        traceback.print_exc(file=_failures.log or sys.__stderr__)
        _leave(rank, f"{type(error).__name__}: {error}".split("\n")[0], code=1)


def _join(rank: int, size: int, *, device: torch.device, timeout: timedelta) -> None:
    alone = os.environ.get("LOCAL_WORLD_SIZE") == str(size)
    if alone and "GLOO_SOCKET_IFNAME" not in os.environ:
        os.environ["GLOO_SOCKET_IFNAME"] = loopback()
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    store = None
    if STORE in os.environ:  # a new file for every group: after a restart the port is another
        name = f"{os.environ['MASTER_PORT']}-{os.environ['TORCHELASTIC_RESTART_COUNT']}"
        store = FileStore(str(Path(os.environ[STORE], name)), size)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)


def own_device(device: torch.device) -> torch.device:
    """A GPU of its own for each process of a machine. UserError: more processes than GPUs."""
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if device.type != "cuda" or processes == 1:
        return device
    if processes > torch.cuda.device_count():
        raise UserError(
            f"{processes} processes for {torch.cuda.device_count()} GPUs of this machine: a process can hold several "
            "blocks; take one process per GPU"
        )
    return torch.device("cuda", int(os.environ["LOCAL_RANK"]))


def loopback() -> str:
    """The name of the network interface that leads back to this machine."""
    return next(name for _, name in socket.if_nameindex() if name.startswith("lo"))


def _leave(rank: int, message: str, *, code: int) -> None:
    """End this process at once: it shall not wait for others, nor they for it."""
    report = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if report:
        Path(report).write_text(json.dumps({"message": message, "timestamp": str(int(time.time()))}))
    if LAUNCHED not in os.environ:  # who has set it reads the report
        print(f"bll: rank {rank}: {message}", file=sys.__stderr__)
    for stream in (_failures.log, sys.__stdout__, sys.__stderr__):
        if stream is not None:
            stream.flush()
    os._exit(code)


def _die_with_parent() -> None:
    """Where the system can do it: no process goes on alone when the one that started it is killed."""
    if sys.platform == "linux" and "TORCHELASTIC_RUN_ID" in os.environ:
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def _said(stream: TextIO) -> str:
    return stream.getvalue() if isinstance(stream, StringIO) else ""
