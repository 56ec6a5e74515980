"""How the machines of a run meet, and what each of them learns."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from queue import Empty, Queue
from threading import Thread
from typing import Any, Protocol, TypeVar

from blocklocal.lab.distributed.process_group import STORE

T = TypeVar("T")

ANSWER = 90  # seconds to reach the endpoint in; torch tries for 60, but waits for ever for one that takes and is silent
LEAVE = 300  # seconds that a machine whose processes are done waits for the others


@dataclass(frozen=True)
class Place:
    """A machine's first rank, the number of all processes, and the environment through which they meet."""

    first: int
    size: int
    environment: dict[str, str]


class Rendezvous(Protocol):
    def join(self) -> Place:
        """Meet the other machines, before every start of the processes. OSError: this failed."""
        ...

    def changed(self) -> bool:
        """Whether a machine waits to join, so that all must meet again. OSError: the others cannot be reached."""
        ...

    def done(self) -> bool:
        """Whether the other machines are done too; called when the processes here are."""
        ...

    def close(self) -> None:
        """End the rendezvous: no machine can join any more."""
        ...


class Alone:
    """One machine: its processes meet in a new file in `folder` at every start, so no port is opened."""

    def __init__(self, *, processes: int, folder: Path) -> None:
        self._processes, self._folder, self._starts = processes, folder, 0

    def join(self) -> Place:
        self._starts += 1
        rendezvous = {
            STORE: str(self._folder / f"meeting{self._starts}"),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": "0",
        }
        return Place(0, self._processes, rendezvous)

    def changed(self) -> bool:
        return False

    def done(self) -> bool:
        return True

    def close(self) -> None:
        pass


class Endpoint:
    """Several machines, LEAST to MOST, that meet through torch's rendezvous at HOST:PORT.

    address: of this machine, as the others see it. hosts: whether the endpoint is here. OSError: nobody answers.
    """

    def __init__(self, endpoint: str, *, processes: int, machines: tuple[int, int], address: str, hosts: bool) -> None:
        from torch.distributed.elastic.rendezvous import RendezvousParameters, registry

        os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # else a restart meets at a store that is gone
        self._endpoint, self._processes = endpoint, processes
        parameters = RendezvousParameters(
            backend="c10d",
            endpoint=endpoint,
            run_id="blocklocal",
            min_nodes=machines[0],
            max_nodes=machines[1],
            local_addr=address,
            is_host=str(hosts).lower(),
        )
        with self._answering():
            self._handler = within(ANSWER, partial(registry.get_rendezvous_handler, parameters))
        self._info: Any = None
        self._left: float | None = None  # when this machine was done

    def join(self) -> Place:
        with self._answering():
            self._info = info = self._handler.next_rendezvous()
            self._left = None
            info.store.set(f"processes{info.rank}", str(self._processes))
            processes = [int(info.store.get(f"processes{rank}")) for rank in range(info.world_size)]
        master = info.bootstrap_store_info
        assert master is not None
        environment = {"MASTER_ADDR": master.master_addr, "MASTER_PORT": str(master.master_port)}
        return Place(sum(processes[: info.rank]), sum(processes), environment)

    def changed(self) -> bool:
        with self._answering():
            return self._handler.num_nodes_waiting() > 0

    def done(self) -> bool:
        now = time.monotonic()
        try:
            done = self._info.store.add("done", 1 if self._left is None else 0)
        except RuntimeError:  # the machine at the endpoint is gone, so it has seen all of them done
            return True
        self._left = self._left or now
        return done >= self._info.world_size or now > self._left + LEAVE

    def close(self) -> None:
        self._handler.shutdown()

    @contextmanager
    def _answering(self) -> Iterator[None]:
        from torch.distributed.elastic.rendezvous import (
            RendezvousClosedError,
            RendezvousConnectionError,
            RendezvousError,
            RendezvousTimeoutError,
        )

        try:
            yield
        except RendezvousClosedError as error:
            raise OSError("another machine has ended the run") from error
        except RendezvousTimeoutError as error:
            raise OSError(f"too few machines came to {self._endpoint}") from error
        except (RendezvousConnectionError, RuntimeError) as error:
            raise OSError(f"nobody answers at {self._endpoint} ({_reason(error)})") from error
        except RendezvousError as error:
            raise OSError(f"the machines did not meet at {self._endpoint} ({_reason(error)})") from error


def within(seconds: float, call: Callable[[], T]) -> T:
    """The result of a call that may never return or react to signals. TimeoutError: it takes longer than `seconds`."""
    results: Queue[T | Exception] = Queue()

    def run() -> None:
        try:
            results.put(call())
        except Exception as error:  # handed to the thread that waits
            results.put(error)

    Thread(target=run, daemon=True).start()
    try:
        result = results.get(timeout=seconds)
    except Empty:
        raise TimeoutError(f"what listens there has not answered for {seconds:g} s") from None
    if isinstance(result, Exception):
        raise result
    return result


def _reason(error: Exception) -> str:
    return str(error.__cause__ or error).split("\n")[0].rstrip(". ")
