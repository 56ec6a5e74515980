"""What a schedule takes: programs of computing and messages, run against a clock of numbers instead of on processes.

A message travels once both sides have posted it and the one before it on the same way has arrived, as it does with
gloo; `latency` and `bandwidth` say how long it takes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True)
class Link:
    """Between two neighbours, each way: seconds before a message moves, and bytes per second."""

    latency: float = 0.0
    bandwidth: float = float("inf")

    def seconds(self, size: float) -> float:
        return self.latency + size / self.bandwidth


class Message(NamedTuple):
    """From rank to rank, `size` bytes; what else tells it apart is in `name`."""

    source: int
    destination: int
    size: float
    name: tuple[str | int, ...]


class Compute(NamedTuple):
    seconds: float


class Post(NamedTuple):
    """Hand a message over, or say that it is expected; takes no time."""

    message: Message


class Wait(NamedTuple):
    """Until a message that was posted has arrived."""

    message: Message


Step = Compute | Post | Wait
Program = Sequence[Step]


def simulate(programs: Sequence[Program], *, link: Link) -> list[float]:
    """The second at which each rank has finished its program. ValueError: programs that wait for each other."""
    return _Simulation(programs, link).run()


class _Simulation:
    def __init__(self, programs: Sequence[Program], link: Link) -> None:
        self.programs, self.link = programs, link
        self.clock = [0.0] * len(programs)
        self.position = [0] * len(programs)
        self.posted: dict[Message, float] = {}
        self.arrived: dict[Message, float] = {}
        self.free: dict[tuple[int, int], float] = {}

    def run(self) -> list[float]:
        ranks = range(len(self.programs))
        while any(self.position[rank] < len(self.programs[rank]) for rank in ranks):
            if not any(self.advance(rank) for rank in ranks):
                raise ValueError("the programs wait for each other")
        return self.clock

    def advance(self, rank: int) -> bool:
        """Run a rank until it waits for what is not known yet; whether it got anywhere."""
        begin, program = self.position[rank], self.programs[rank]
        while self.position[rank] < len(program):
            step = program[self.position[rank]]
            if isinstance(step, Compute):
                self.clock[rank] += step.seconds
            elif isinstance(step, Post):
                self.post(step.message, self.clock[rank])
            elif step.message in self.arrived:
                self.clock[rank] = max(self.clock[rank], self.arrived[step.message])
            else:
                break
            self.position[rank] += 1
        return self.position[rank] > begin

    def post(self, message: Message, now: float) -> None:
        if message not in self.posted:
            self.posted[message] = now
            return
        way = (message.source, message.destination)
        start = max(now, self.posted[message], self.free.get(way, 0.0))
        self.arrived[message] = self.free[way] = start + self.link.seconds(message.size)
