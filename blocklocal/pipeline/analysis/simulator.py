"""What a schedule takes: programs of computing and messages, run against a clock of numbers instead of on processes.

Messages go as with gloo: the receiver's notice that a message is expected goes to the sender, behind what travels that
way already; then the message goes, behind the one before it. The sender is done when its system has taken the bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True)
class Link:
    """Between two neighbours, each way: seconds until a byte is there, bytes per second.

    buffer: of a message's bytes, how many the sender's system takes at once.
    """

    latency: float = 0.0
    bandwidth: float = float("inf")
    buffer: float = float("inf")

    def seconds(self, size: float) -> float:
        """Until so many bytes are there, on a way that is free."""
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
        self.done: dict[tuple[int, Message], float] = {}
        self.free: dict[tuple[int, int], float] = {}

    def run(self) -> list[float]:
        while any(self.step(rank) is not None for rank in range(len(self.programs))):
            able = [rank for rank in range(len(self.programs)) if self.able(rank)]
            if not able:
                raise ValueError("the programs wait for each other")
            self.advance(min(able, key=self.clock.__getitem__))  # so that messages are posted in the order of time
        return self.clock

    def step(self, rank: int) -> Step | None:
        program, position = self.programs[rank], self.position[rank]
        return program[position] if position < len(program) else None

    def able(self, rank: int) -> bool:
        """Whether a rank is not at its end, nor waiting for what is not known yet."""
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
            now = max(now, self.free.get(back, 0.0)) + self.link.latency  # the notice is there
        if message not in self.posted:
            self.posted[message] = now
            return
        start = max(now, self.posted[message], self.free.get(way, 0.0))
        self.free[way] = start + message.size / self.link.bandwidth
        left_over = max(0.0, message.size - self.link.buffer)
        self.done[message.source, message] = start + left_over / self.link.bandwidth
        self.done[message.destination, message] = self.free[way] + self.link.latency
