"""How long a schedule takes: programs of computation and messages, run on a simulated clock instead of on processes.

Messages go as with gloo: the receiver notifies the sender that it expects a message, behind what already travels in
that direction; then the message goes, behind the one before it. The sender is done when its system has taken the bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True)
class Link:
    """A link between two neighbours, in either direction: latency in seconds, bandwidth in bytes per second.

    buffer: the number of bytes of a message that the sender's system takes at once.
    """

    latency: float = 0.0
    bandwidth: float = float("inf")
    buffer: float = float("inf")

    def seconds(self, size: float) -> float:
        """Seconds until `size` bytes have arrived over a free link."""
        return self.latency + size / self.bandwidth


class Message(NamedTuple):
    """A message of `size` bytes from rank to rank; `name` tells it apart from others."""

    source: int
    destination: int
    size: float
    name: tuple[str | int, ...]


class Compute(NamedTuple):
    seconds: float


class Post(NamedTuple):
    """Hand a message over, or announce that it is expected; takes no time."""

    message: Message


class Wait(NamedTuple):
    """Wait until a message that was posted has arrived."""

    message: Message


Step = Compute | Post | Wait
Program = Sequence[Step]


def simulate(programs: Sequence[Program], *, link: Link) -> list[float]:
    """The second at which each rank finishes its program. ValueError: programs that wait for each other."""
    return _Simulation(programs, link).run()


class _Simulation:
    def __init__(self, programs: Sequence[Program], link: Link) -> None:
        self.programs, self.link = programs, link
        self.clock = [0.0] * len(programs)
        self.position = [0] * len(programs)
        self.posted: dict[Message, float] = {}
        self.done: dict[tuple[int, Message], float] = {}
        self.free: dict[tuple[int, int], float] = {}

    def run(self) -> list[float]:
        while any(self.step(rank) is not None for rank in range(len(self.programs))):
            able = [rank for rank in range(len(self.programs)) if self.able(rank)]
            if not able:
                raise ValueError("the programs wait for each other")
            self.advance(min(able, key=self.clock.__getitem__))  # so that messages are posted in order of time
        return self.clock

    def step(self, rank: int) -> Step | None:
        program, position = self.programs[rank], self.position[rank]
        return program[position] if position < len(program) else None

    def able(self, rank: int) -> bool:
        """Whether a rank can go on: neither at its end nor waiting for something that is not known yet."""
        step = self.step(rank)
        return step is not None and not (isinstance(step, Wait) and (rank, step.message) not in self.done)

    def advance(self, rank: int) -> None:
        step = self.step(rank)
        if isinstance(step, Compute):
            self.clock[rank] += step.seconds
        elif isinstance(step, Post):
            self.post(step.message, rank)
        elif isinstance(step, Wait):
            self.clock[rank] = max(self.clock[rank], self.done[rank, step.message])
        self.position[rank] += 1

    def post(self, message: Message, rank: int) -> None:
        now = self.clock[rank]
        way, back = (message.source, message.destination), (message.destination, message.source)
        if rank == message.destination:
            now = max(now, self.free.get(back, 0.0)) + self.link.latency  # the notice has arrived
        if message not in self.posted:
            self.posted[message] = now
            return
        start = max(now, self.posted[message], self.free.get(way, 0.0))
        self.free[way] = start + message.size / self.link.bandwidth
        left_over = max(0.0, message.size - self.link.buffer)
        self.done[message.source, message] = start + left_over / self.link.bandwidth
        self.done[message.destination, message] = self.free[way] + self.link.latency
