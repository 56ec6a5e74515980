"""What runs are judged by in reports: the accuracy of an exit, or for text its cross-entropy."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from blocklocal.lab.settings import Settings


@dataclass(frozen=True)
class Measure:
    """A value in the record of an epoch. name: what it is called; unit, scale: as it is shown."""

    name: str
    unit: str
    scale: float = 1.0

    def exit(self, record: Mapping[str, Any], k: int = -1) -> float:
        """The value of exit k on the test samples; by default of the last one."""
        return self.scale * record[f"test_{self.name}"][k]

    def combined(self, record: Mapping[str, Any]) -> float:
        """The value of all exits combined; nan where the blocks were not yet together."""
        return self.scale * record.get(f"test_{self.name}_all", math.nan)


ACCURACY, LOSS = Measure("accuracy", "%", 100.0), Measure("loss", "nats")


def measure_of(settings: Settings) -> Measure:
    return LOSS if settings.kind == "text" else ACCURACY
