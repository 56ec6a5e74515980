"""What a test says of an exit in one number: its accuracy, its cross-entropy, its error."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Measure:
    """A number in the record of an epoch: test_NAME of each exit, test_NAME_all of all exits combined.

    label: what it is called. unit: if it has one of its own. scale, decimals: as it is shown; without decimals, four
    significant digits. rises: whether more of it is better.
    """

    name: str
    label: str
    unit: str = ""
    scale: float = 1.0
    decimals: int | None = None
    rises: bool = False

    def exit(self, record: Mapping[str, Any], k: int = -1) -> float:
        """The value of exit k on the test samples; by default of the last one."""
        return record[f"test_{self.name}"][k]

    def combined(self, record: Mapping[str, Any]) -> float:
        """The value of all exits combined; nan where the blocks were not yet together."""
        return record.get(f"test_{self.name}_all", math.nan)

    def merit(self, value: float) -> float:
        """The value, or minus it: of two, the better one has more merit."""
        return value if self.rises else -value

    def show(self, value: float, spread: float | None = None, *, sign: str = "", finer: int = 0) -> str:
        """The value in its unit, which is not named, with its spread.

        sign: "+" for differences. finer: number of further digits.

        >>> ACCURACY.show(0.8441), ACCURACY.show(-0.0152, 0.0041, sign="+", finer=1), RMSE.show(54321.06)
        ('84.4', '−1.52 ± 0.41', '54,321')
        """
        value = self.scale * value
        places = _places(value, digits=4) if self.decimals is None else self.decimals
        form = f",.{places + finer}f" if self.decimals is None else f".{places + finer}f"
        if not 0 <= places <= 9:
            form = f".{3 + finer}e"
        shown = f"{value:{sign}{form}}".replace("-", "−")
        return shown if spread is None else f"{shown} ± {self.scale * spread:{form}}"


def _places(value: float, *, digits: int) -> int:
    """Decimal places of a number with so many significant digits; none of a large one."""
    if not math.isfinite(value) or value == 0:
        return digits - 1
    exponent = math.floor(math.log10(abs(value)))
    return max(0, digits - 1 - exponent) if exponent < 12 else -1


ACCURACY = Measure("accuracy", "accuracy", "%", scale=100.0, decimals=1, rises=True)
LOSS = Measure("loss", "loss", "nats", decimals=3)
RMSE = Measure("rmse", "RMSE")
"""Root mean squared error, in the unit of the target."""
MEASURES = (ACCURACY, LOSS, RMSE)


def measures_of(kind: str, facts: Mapping[str, Any]) -> tuple[Measure, ...]:
    """`Task.shown` of a run, from the kind of its data, see `settings.kind_of`, and its facts, see `Task.facts`."""
    if kind == "text":
        return ACCURACY, LOSS
    return (RMSE,) if "target_deviation" in facts else (ACCURACY,)
