"""The learning rate of a step, as a share of the highest, from the number of the step alone."""

from __future__ import annotations

import math
from collections.abc import Callable

Schedule = Callable[[int, int, int], float]


def cosine(step: int, warmup: int, total: int) -> float:
    """Linear rise over `warmup` steps, then half a cosine to zero."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(total - warmup, 1)))


def onecycle(step: int, warmup: int, total: int) -> float:
    """Linear rise over the first 30 % of the steps, linear fall to zero; `warmup` plays no part."""
    peak = max(round(0.3 * total), 1)
    return (step + 1) / peak if step < peak else (total - step) / max(total - peak, 1)


def constant(step: int, warmup: int, total: int) -> float:
    """Linear rise over `warmup` steps, then one."""
    return (step + 1) / warmup if step < warmup else 1.0


SCHEDULES: dict[str, Schedule] = {"cosine": cosine, "onecycle": onecycle, "constant": constant}
