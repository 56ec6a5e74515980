"""What each rank did and when: the records of a run, and how a rank makes them."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from blocklocal.arguments import describe, require, require_device, require_whole

Phase = Literal["forward", "backward", "send", "copy", "wait"]

FAR = 1e12  # seconds, beyond every clock


@dataclass(frozen=True)
class Record:
    """A span of time of one rank; `start` and `end` are in seconds of the system clock.

    forward: the block's forward pass and local loss. backward: local backward pass and optimizer step. send: handing
    the message over. copy: handing a copy of the block's first unit, as it is before the minibatch, to the border
    before it. wait: everything else before a forward pass, mainly waiting for a message, and at the end of a window
    waiting until the last messages are taken. size: the number of bytes handed to another rank.

    >>> Record(rank=0, replica=0, block=1, minibatch=2, phase="forward", start=1.0, end=1.5).seconds
    0.5
    """

    rank: int
    replica: int
    block: int
    minibatch: int
    phase: Phase
    start: float
    end: float
    size: int = 0

    @property
    def seconds(self) -> float:
        return self.end - self.start


class Trace:
    """Makes the records of one rank like a stopwatch: each begins where the last one ended, so nothing is left out.

    On a GPU every record synchronises with the device: a traced run shows where time goes, and is a little slower.

    >>> trace = Trace(rank=0, replica=0, device=torch.device("cpu"))
    >>> trace.start()
    >>> trace.record("forward", block=0, minibatch=0)
    >>> trace.records[0].phase
    'forward'
    """

    def __init__(self, *, rank: int, replica: int, device: torch.device) -> None:
        self.rank = require_whole(rank, name="rank", least=0)
        self.replica = require_whole(replica, name="replica", least=0)
        self.device = require_device(device, name="device")
        self.records: list[Record] = []
        self._last = 0.0

    def start(self) -> None:
        """Begin the first record now."""
        self._last = time.time()

    def record(self, phase: Phase, *, block: int, minibatch: int, size: int = 0) -> None:
        """Record the time since the last record as this phase."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.time()
        self.records.append(Record(self.rank, self.replica, block, minibatch, phase, self._last, now, size))
        self._last = now

    def save(self, path: Path) -> None:
        """Write one JSON object per line; the file is replaced as a whole, or stays as it was."""
        part = path.with_name(f"{path.name}.part")
        try:
            part.write_text("".join(json.dumps(asdict(record)) + "\n" for record in self.records))
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)


def load(paths: Iterable[Path | str]) -> list[Record]:
    """Load the records of several ranks, one file each, in the order of their start.

    ValueError: a file with other content or an incomplete line; a rank in two files.

    >>> load([])
    []
    >>> records = load(Path("runs/first/trace").glob("*.jsonl"))
    """
    records, files, needed = [], {}, "pass a list of files"
    if isinstance(paths, str | bytes):
        raise TypeError(f"paths is {describe(paths)}: {needed}")
    require(paths, Iterable, name="paths", needed=needed)
    for given in paths:
        require(given, Path | str, name="an item of paths", needed=needed)
        path = Path(given)
        *lines, rest = path.read_bytes().split(b"\n")
        if rest:
            raise ValueError(f"{str(path)!r} ends inside line {len(lines) + 1}")
        for number, line in enumerate(lines, start=1):
            record = _read(line, place=f"line {number} of {str(path)!r}")
            if files.setdefault(record.rank, path) != path:
                raise ValueError(
                    f"{str(files[record.rank])!r} and {str(path)!r} both hold records of rank {record.rank}"
                )
            records.append(record)
    return sorted(records, key=lambda record: record.start)


def _read(line: bytes, *, place: str) -> Record:
    try:
        record = Record(**json.loads(line))
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{place} is not a record ({error})") from error
    allowed: dict[str, tuple[Callable[[Any], bool], str]] = {
        **dict.fromkeys(("rank", "replica", "block", "minibatch", "size"), (_counts, "an integer, 0 or more")),
        "phase": (lambda value: value in get_args(Phase), ", ".join(get_args(Phase))),
        "start": (_measures, "seconds"),
        "end": (lambda value: _measures(value) and value >= record.start, "seconds, not before its start"),
    }
    for name, (fits, what) in allowed.items():
        value = getattr(record, name)
        if not fits(value):
            raise ValueError(f"{place} is not a record ({name}: expected {what}, got {value!r})")
    return record


def _counts(value: Any) -> bool:
    return type(value) is int and value >= 0


def _measures(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < FAR
