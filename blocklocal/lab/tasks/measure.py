"""What a test says of an exit in one number: its accuracy, its cross-entropy, its error."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Measure:
    """A number in the record of an epoch: test_NAME of each exit, test_NAME_all of all exits combined.

    label: what it is called. unit: if it has one of its own. scale, decimals: as it is shown; without decimals, three
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

    def show(
        self, value: float, spread: float | None = None, *, sign: str = "", finer: int = 0, like: float | None = None
    ) -> str:
        """The value in its unit, which is not named, with its spread.

        sign: "+" for differences. finer: number of further digits. like: another value, whose decimal places it gets.

        >>> ACCURACY.show(0.8441), ACCURACY.show(-0.0152, 0.0041, sign="+", finer=1), RMSE.show(54321.06)
        ('84.4', '−1.52 ± 0.41', '54,321')
        """
        value = self.scale * value
        if self.decimals is None:
            form = _significant(value if like is None else self.scale * like, digits=3 + finer)
        else:
            form = f".{self.decimals + finer}f"
        shown = f"{value:{sign}{form}}".replace("-", "−")
        return shown if spread is None else f"{shown} ± {self.scale * spread:{form}}"


def _significant(value: float, *, digits: int) -> str:
    """The format of a number with at least so many significant digits, and an exponent if it is very large or small."""
    exponent = math.floor(math.log10(abs(value))) if value and math.isfinite(value) else 0
    return f",.{max(0, digits - 1 - exponent)}f" if -4 <= exponent < 12 else f".{digits - 1}e"


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
