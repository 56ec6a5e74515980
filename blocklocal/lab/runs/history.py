"""What the folder of a run tells, whether the run is finished, under way or broken off."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blocklocal.lab.errors import UserError
from blocklocal.lab.runs.folder import Run
from blocklocal.lab.settings import Settings


@dataclass(frozen=True)
class History:
    """A run as far as it has come.

    facts: what config.json says beside the settings. records: the lines of metrics.jsonl, one per epoch. finished: the
    weights are there, after all epochs. changed: when the last epoch ended, in seconds of the system's clock.
    """

    path: Path
    settings: Settings
    facts: dict[str, Any]
    records: tuple[dict[str, Any], ...]
    finished: bool
    changed: float

    @property
    def accuracies(self) -> list[float]:
        """Of the last exit on the test images after each epoch, as fractions."""
        return [record["test_accuracy"][-1] for record in self.records]

    @property
    def seconds(self) -> float:
        """Training alone, without tests."""
        return sum(record["seconds"] for record in self.records)

    @property
    def peak_memory(self) -> float:
        """MiB: on a GPU of tensors, elsewhere of the whole process."""
        return max((record["peak_memory_mib"] for record in self.records), default=0.0)


def read(path: Path) -> History:
    """The run in a folder. UserError: no run there, or files that no run has written."""
    run = Run(path)
    settings, records = run.settings(), tuple(run.records())
    facts = {name: fact for name, fact in run.facts().items() if name != "settings"}
    finished = run.model.exists() and len(records) == settings.epochs
    changed = (run.metrics if records else run.config).stat().st_mtime
    return History(path, settings, facts, records, finished, changed)


def find(path: Path) -> list[Path]:
    """The folder if it holds a run, else the runs in folders below it, in the order of their names.

    UserError: neither.
    """
    if Run(path).exists:
        return [path]
    if not os.path.isdir(path):
        raise UserError(f"{str(path)!r} is not a folder; a run is what bll train writes, in runs/ by default")
    found = sorted(config.parent for config in path.rglob("config.json") if Run(config.parent).exists)
    if not found:
        raise UserError(
            f"{str(path)!r} holds no run: it has no config.json, and no folder in it has; a run is what bll train "
            "writes, in runs/ by default"
        )
    return found
