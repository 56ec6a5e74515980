"""What each rank did and when: the records of a run, and how a rank takes them."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch

Doing = Literal["forward", "backward", "send", "wait"]


@dataclass(frozen=True)
class Record:
    """One stretch of time of one rank, `start` and `end` in seconds of the system's clock.

    forward: block's forward pass and local loss. backward: local backward pass and optimizer step. send: handing the
    message over. wait: everything else before a forward pass, above all for a message, and at the end of a window
    until the last messages are taken.
    """

    rank: int
    replica: int
    block: int
    minibatch: int
    doing: Doing
    start: float
    end: float

    @property
    def seconds(self) -> float:
        return self.end - self.start


class Trace:
    """Takes the records of one rank like a stopwatch: a lap begins where the last one ended, so nothing is left out.

    On a GPU every lap waits for the device: a traced run shows where time goes, and takes a little more of it.
    """

    def __init__(self, *, rank: int, replica: int, device: torch.device) -> None:
        self.rank, self.replica, self.device = rank, replica, device
        self.records: list[Record] = []
        self._last = 0.0

    def start(self) -> None:
        """Let the first lap begin now."""
        self._last = time.time()

    def lap(self, doing: Doing, *, block: int, minibatch: int) -> None:
        """The time since the last lap went into this."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.time()
        self.records.append(Record(self.rank, self.replica, block, minibatch, doing, self._last, now))
        self._last = now

    def save(self, path: Path) -> None:
        """One JSON object per line."""
        path.write_text("".join(json.dumps(asdict(record)) + "\n" for record in self.records))


def load(paths: Iterable[Path]) -> list[Record]:
    """The records of several ranks, in the order of their start."""
    records = [Record(**json.loads(line)) for path in paths for line in path.read_text().splitlines()]
    return sorted(records, key=lambda record: record.start)
