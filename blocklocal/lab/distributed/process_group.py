"""The processes of a run: how this one joins the others, and the sums they compute together."""

from __future__ import annotations

import ctypes
import os
import re
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from blocklocal.internals import UnsupportedTorch
from blocklocal.lab.distributed.rank_log import LAUNCHED, RankLog
from blocklocal.lab.environment import find_device
from blocklocal.lab.errors import UserError
from blocklocal.lab.ranges import Range

# Set by `bll launch` for the processes that it starts.
STORE = "BLOCKLOCAL_STORE"  # file in which the processes of one machine meet, instead of at a port
PARENT = "BLOCKLOCAL_PARENT"  # process that started them
START = timedelta(seconds=60)  # shortest time allowed between the first and the last process to start
FIRST, AGAIN = "first", "again"  # values of LAUNCHED: whether the run begins or restarts


@dataclass(frozen=True)
class Processes:
    """This process among those of a run, all of which call the same methods in the same order.

    group: for their sums; None in a process that was started alone. device: of this process.
    """

    device: torch.device
    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None
    rank_log: RankLog | None = None

    @property
    def distributed(self) -> bool:
        """Whether the run was started as a group of processes, even of only one."""
        return self.group is not None

    @property
    def restarted(self) -> bool:
        """Whether the processes of this run were started before."""
        return os.environ.get(LAUNCHED) == AGAIN or int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all processes, the same on each; a value that is zero on all others is unchanged."""
        if self.group is not None:
            dist.all_reduce(values := values.clone(), group=self.group)
        return values

    def largest(self, value: float) -> float:
        if self.group is not None:
            dist.all_reduce(values := torch.tensor(value, dtype=torch.float64), op=dist.ReduceOp.MAX, group=self.group)
            value = values.item()
        return value

    def broadcast(self, value: int) -> int:
        """The value of rank 0."""
        return int(self.sum(torch.tensor(value if self.rank == 0 else 0)))

    def barrier(self) -> None:
        """Wait for all processes."""
        self.sum(torch.zeros(()))

    def log_to(self, run: Path) -> None:
        """From now on, write the output of every process but the first to its log file in the run's folder."""
        if self.rank_log:
            self.rank_log.open(run)


# The environment that torchrun, `bll launch` and other launchers set, and the allowed values.
NUMBERS = {
    "RANK": Range(least=0),
    "WORLD_SIZE": Range(least=1),
    "LOCAL_RANK": Range(least=0),
    "LOCAL_WORLD_SIZE": Range(least=1),
    "MASTER_PORT": Range(least=0, most=65535),
    "TORCHELASTIC_RESTART_COUNT": Range(least=0),
}
NEEDED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def environment() -> tuple[int, int] | None:
    """Rank and number of processes, if this one was started as one of several. UserError: the environment is incomplete
    or has invalid numbers."""
    if "RANK" not in os.environ:
        return None
    for name in NEEDED:
        if not os.environ.get(name):
            raise UserError(f"RANK is set but {name} is not: start with bll launch or torchrun, or unset RANK")
    for name, allowed in NUMBERS.items():
        text = os.environ.get(name, "0" if allowed.least == 0 else "1")
        if not re.fullmatch(r"\d{1,18}", text, re.ASCII):
            raise UserError(f"the environment's {name} is {text!r}, not a number: start with bll launch or torchrun")
        allowed.check(f"the environment's {name}", int(text))
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if rank >= size:
        raise UserError(f"the environment's RANK {rank} is not one of {size} processes (WORLD_SIZE)")
    return rank, size


@contextmanager
def joined(*, device: str, timeout: float) -> Iterator[Processes]:
    """This process in its group, if it was started as one of several. All processes end together in any case.

    device: name, as for `find_device`. timeout: seconds after which a process that does not answer is given up.
    """
    place = environment()
    if place is None:
        yield Processes(find_device(device))
        return
    rank, size = place
    rank_log = RankLog(rank, size=size)
    try:
        _die_with_parent()
        own, limit = _own_device(device), timedelta(seconds=timeout)
        _join(rank, size, device=own, timeout=limit)
        group = dist.new_group(backend="gloo", timeout=limit)
        assert isinstance(group, dist.ProcessGroup)
        yield Processes(own, rank, size, group, rank_log)
        dist.destroy_process_group()
    except (UserError, UnsupportedTorch) as error:
        rank_log.end(error, code=2)
    except KeyboardInterrupt as error:
        rank_log.end(error, code=130)
    except Exception as error:
        rank_log.end(error, code=1)


def loopback() -> str:
    """The name of the loopback interface."""
    return next(name for _, name in socket.if_nameindex() if name.startswith("lo"))


def _join(rank: int, size: int, *, device: torch.device, timeout: timedelta) -> None:
    alone = os.environ.get("LOCAL_WORLD_SIZE") == str(size)
    if alone and "GLOO_SOCKET_IFNAME" not in os.environ:
        os.environ["GLOO_SOCKET_IFNAME"] = loopback()
    store = _gathered(rank, size, timeout=max(timeout, START))
    store.set_timeout(timeout)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)


def _gathered(rank: int, size: int, *, timeout: timedelta) -> dist.Store:  # pyright: ignore[reportPrivateImportUsage]
    """The store through which the processes meet, once all are there. OSError: one is missing."""
    try:
        if STORE in os.environ:
            store = dist.FileStore(os.environ[STORE], size)  # pyright: ignore[reportPrivateImportUsage]
        else:
            store, _, _ = next(rendezvous("env://", rank, size, timeout=timeout))
        store.set(f"came{rank}", "")
        store.wait([f"came{other}" for other in range(size)], timeout)
    except RuntimeError as error:
        raise OSError(f"the {size} processes did not all start within {timeout.total_seconds():g} s") from error
    return store


def _own_device(name: str) -> torch.device:
    """A GPU of its own for each process of a machine. UserError: no such device, or more processes than GPUs."""
    device, processes = find_device(name), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if device.type != "cuda" or processes == 1:
        return device
    if processes > torch.cuda.device_count():
        raise UserError(
            f"{processes} processes for the {torch.cuda.device_count()} GPUs of this machine: start one process per "
            "GPU, which can hold several blocks"
        )
    return torch.device("cuda", int(os.environ["LOCAL_RANK"]))


def _die_with_parent() -> None:
    """End this process when its parent is killed, where the system supports that."""
    if sys.platform == "linux" and {PARENT, "TORCHELASTIC_RUN_ID"} & set(os.environ):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.environ.get(PARENT, str(os.getppid())) != str(os.getppid()):
            os._exit(1)  # it was killed before
