"""The history of a run from its folder, whether it is finished, in progress or interrupted."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blocklocal.lab.errors import UserError
from blocklocal.lab.runs.folder import Run
from blocklocal.lab.settings import Settings
from blocklocal.lab.tasks.measure import Measure, measures_of


@dataclass(frozen=True)
class History:
    """A run up to its last epoch.

    facts: the rest of config.json. records: the lines of metrics.jsonl, one per epoch. weights: whether the
    trained model is there. changed: when the last epoch ended, in seconds of the system clock.
    """

    path: Path
    settings: Settings
    facts: dict[str, Any]
    records: tuple[dict[str, Any], ...]
    weights: bool
    changed: float

    @property
    def finished(self) -> bool:
        """Whether all epochs are recorded; the weights may have been left out."""
        return len(self.records) == self.settings.epochs

    @property
    def complete(self) -> bool:
        """Whether nothing is left to do."""
        return self.finished and self.weights

    @property
    def measures(self) -> tuple[Measure, ...]:
        """See `Task.shown`."""
        return measures_of(self.settings.kind, self.facts["data"])

    @property
    def seconds(self) -> float:
        """Seconds of training, without tests."""
        return sum(record["seconds"] for record in self.records)

    @property
    def peak_memory(self) -> float:
        """Peak memory in MiB: of tensors on a GPU, otherwise of the whole process."""
        return max((record["peak_memory_mib"] for record in self.records), default=0.0)


def read(path: Path) -> History:
    """Read the run in a folder. UserError: no run there, or invalid files."""
    run = Run(path)
    settings, records = run.settings(), tuple(run.records())
    facts = {name: fact for name, fact in run.facts().items() if name != "settings"}
    changed = (run.metrics if records else run.config).stat().st_mtime
    return History(path, settings, facts, records, run.model.exists(), changed)


def find(path: Path) -> list[Path]:
    """The folder itself if it holds a run, else the runs in its subfolders, sorted by name.

    UserError: there is no run.
    """
    if Run(path).exists:
        return [path]
    if not os.path.isdir(path):
        raise UserError(f"{str(path)!r} is not a folder; a run is what bll train writes, in runs/ by default")
    found = sorted(config.parent for config in path.rglob("config.json") if Run(config.parent).exists)
    if not found:
        raise UserError(
            f"{str(path)!r} holds no run: neither it nor a subfolder has a config.json; a run is what bll train "
            "writes, in runs/ by default"
        )
    return found
