"""What the records of a run show: who was busy, who waited, and which pace the slowest stage allows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import mean, median

from blocklocal.pipeline.trace import Phase, Record

BUSY: tuple[Phase, ...] = ("forward", "backward", "send", "copy")


@dataclass(frozen=True)
class Timeline:
    """The records of all ranks of one run; times in seconds."""

    records: Sequence[Record]

    def __post_init__(self) -> None:
        if not self.records:
            raise ValueError("a timeline needs records: was the pipeline made with trace=True?")
        for rank in self.ranks:
            phases = [record.phase for record in self._of(rank, lambda _: True)]
            if "forward" not in phases or "backward" not in phases[phases.index("forward") :]:
                raise ValueError(f"a timeline needs minibatches of every rank, but rank {rank} has learnt from none")

    @property
    def ranks(self) -> list[int]:
        return sorted({record.rank for record in self.records})

    def blocks(self, rank: int) -> list[int]:
        return sorted({record.block for record in self.records if record.rank == rank})

    def messages(self) -> list[tuple[Record, Record]]:
        """For each message between ranks, the record of its sending and that of the forward pass that needed it.

        A copy goes in the opposite direction, to the block before.
        """
        forward = {(r.replica, r.block, r.minibatch): r for r in self.records if r.phase == "forward"}
        to: dict[Phase, int] = {"send": 1, "copy": -1}
        sent = [
            (r, forward.get((r.replica, r.block + to[r.phase], r.minibatch))) for r in self.records if r.phase in to
        ]
        return [(message, arrival) for message, arrival in sent if arrival is not None and arrival.rank != message.rank]

    def sizes(self, phase: Phase) -> list[int]:
        """The bytes of each message that was handed to another rank in this phase."""
        return [record.size for record in self.records if record.phase == phase and record.size]

    @property
    def fill(self) -> float:
        """Seconds from the first forward pass on any rank until the last rank begins its first one."""
        begins = [min(r.start for r in self._of(rank, lambda r: r.phase == "forward")) for rank in self.ranks]
        return max(begins) - min(begins)

    @property
    def stage_seconds(self) -> list[float]:
        """The median time that each rank is busy with a minibatch."""
        return [median(self._busy_by_minibatch(rank).values()) for rank in self.ranks]

    @property
    def imbalance(self) -> float:
        """The longest stage time over the mean: 1 if all are equal."""
        return max(self.stage_seconds) / mean(self.stage_seconds)

    @property
    def predicted_throughput(self) -> float:
        """Minibatches per second once the pipeline is full: the slowest stage sets the pace."""
        return 1 / max(self.stage_seconds)

    @property
    def throughput(self) -> float:
        """Minibatches per second that the last rank finished, from its second one on."""
        ends = sorted(max(r.end for r in records) for records in self._by_minibatch(self.ranks[-1]).values())
        if len(ends) < 2:
            raise ValueError("the throughput needs at least two minibatches")
        return (len(ends) - 1) / (ends[-1] - ends[0])

    def utilisation(self, rank: int) -> float:
        """Share of the time from a rank's first forward pass to its last backward pass in which it was busy."""
        records = self._running(rank)
        return sum(r.seconds for r in records if r.phase in BUSY) / (records[-1].end - records[0].start)

    def waiting(self, rank: int) -> float:
        """The rest of that time: waiting for a message, for data, or for a message to be taken."""
        return 1 - self.utilisation(rank)

    def _running(self, rank: int) -> list[Record]:
        """The records of a rank from its first forward pass to its last backward pass: without fill and drain."""
        records = self._of(rank, lambda r: True)
        first = next(i for i, record in enumerate(records) if record.phase == "forward")
        last = max(i for i, record in enumerate(records) if record.phase == "backward")
        return records[first : last + 1]

    def _of(self, rank: int, which: Callable[[Record], bool]) -> list[Record]:
        return sorted((r for r in self.records if r.rank == rank and which(r)), key=lambda r: r.start)

    def _by_minibatch(self, rank: int) -> dict[int, list[Record]]:
        found: dict[int, list[Record]] = {}
        for record in self._of(rank, lambda r: r.phase in BUSY):
            found.setdefault(record.minibatch, []).append(record)
        return found

    def _busy_by_minibatch(self, rank: int) -> dict[int, float]:
        return {minibatch: sum(r.seconds for r in records) for minibatch, records in self._by_minibatch(rank).items()}
