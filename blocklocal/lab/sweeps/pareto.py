"""The results of a study: error against cost, and the settings that none beats at their cost."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from rich.table import Table

from blocklocal.lab import outputs
from blocklocal.lab.bench.step_cost import Cost
from blocklocal.lab.names import plain, sentence, short
from blocklocal.lab.report.figures import STYLE
from blocklocal.lab.runs.history import History
from blocklocal.lab.tasks.measure import ACCURACY, Measure
from blocklocal.lab.terminal import Terminal


@dataclass(frozen=True)
class Estimate:
    """The mean over runs with its standard error s / √n, which needs two runs."""

    mean: float
    error: float | None

    @staticmethod
    def of(values: Sequence[float]) -> Estimate:
        return Estimate(mean(values), stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None)


@dataclass(frozen=True)
class Point:
    """The result of a row of the grid after the last epoch, in one measure, accuracies as fractions: of the last exit,
    and of all exits combined with weights from the validation samples. cost: of a step, or of a run that trains longer.
    """

    name: str
    runs: int
    blocks: int
    validation: Estimate
    validation_all: Estimate
    test: Estimate
    test_all: Estimate
    cost: Cost

    measure: Measure = ACCURACY

    @property
    def combines(self) -> bool:
        """Whether all exits combined, if there are several, are the better predictor on the validation samples."""
        better = self.measure.merit(self.validation_all.mean) > self.measure.merit(self.validation.mean)
        return better and self.blocks > 1

    @property
    def best(self) -> float:
        """The merit on the validation samples for choosing rows: that of the better predictor."""
        return self.measure.merit((self.validation_all if self.combines else self.validation).mean)

    @property
    def chosen(self) -> Estimate:
        """The test result of the better predictor."""
        return self.test_all if self.combines else self.test

    def error(self, value: float) -> float:
        """A test result as an error, the less the better: an accuracy as its distance from 1."""
        return self.measure.scale * (1 - value if self.measure.rises else value)

    def show(self, result: Estimate) -> str:
        return self.measure.show(result.mean, result.error, finer=1)

    def plain(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self) | {"measure": self.measure.name}


def point(name: str, runs: Sequence[History], *, cost: Cost) -> Point:
    """The result of finished runs, which differ in their seed."""
    last = [run.records[-1] for run in runs]
    measure = runs[0].measures[0]
    validation = f"validation_{measure.name}"
    return Point(
        name,
        runs=len(runs),
        blocks=len(last[0]["train_loss"]),
        validation=Estimate.of([record[validation][-1] for record in last]),
        validation_all=Estimate.of([record[f"{validation}_all"] for record in last]),
        test=Estimate.of([measure.exit(record) for record in last]),
        test_all=Estimate.of([measure.combined(record) for record in last]),
        cost=cost,
        measure=measure,
    )


def front(points: Sequence[Point]) -> list[Point]:
    """The Pareto front: results that none beats on the validation samples at the same or less time, cheapest first."""
    kept: list[Point] = []
    for one in sorted(points, key=lambda one: (one.cost.time, -one.best)):
        if not kept or one.best > kept[-1].best:
            kept.append(one)
    return kept


def _called(points: Sequence[Point]) -> str:
    measure = points[0].measure
    return f"{measure.label} in {measure.unit}" if measure.unit else measure.label


def print_table(points: Sequence[Point], *, title: str) -> None:
    """Print the results to standard output; a star marks the front."""
    chosen = front(points)
    table = Table(
        title=sentence(title),
        caption=f"{_called(points)}, mean ± standard error; time (of the processor), operations, memory: of bp's "
        "training step; *: nothing is better on the validation samples in the same time",
        title_justify="left",
        caption_justify="left",
    )
    table.add_column("settings")
    for name in ("", "validation", "all exits", "test", "all exits", "time", "operations", "memory", "runs"):
        table.add_column(name, justify="right")
    for one in points:
        combined = (one.show(one.validation_all), one.show(one.test_all)) if one.blocks > 1 else ("", "")
        table.add_row(
            short(plain(one.name)),
            "*" if one in chosen else "",
            one.show(one.validation),
            combined[0],
            one.show(one.test),
            combined[1],
            *(f"{ratio:.2f}" for ratio in (one.cost.time, one.cost.operations, one.cost.memory)),
            str(one.runs),
        )
    console = Terminal()
    if not console.is_terminal:
        console.width = 140
    console.print(table)


@matplotlib.rc_context(STYLE)
def draw(points: Sequence[Point], folder: Path, *, title: str) -> None:
    """Draw `study.svg` and `study.png`: test error of the last exit and of all exits against training time."""
    figure = Figure(figsize=(7.2, 4.4), layout="constrained")
    measure = points[0].measure
    axes = figure.add_subplot(
        title=plain(short(title)),
        xlabel="processor time of training, bp = 1",
        ylabel=f"test error, {measure.unit}" if measure.rises else f"test {measure.label}",
    )
    for k, one in enumerate(points):
        colour, label = f"C{k % 10}", f"{k + 1} {short(plain(one.name))}".replace("\n", " ")
        for shown, marker, filled in ((one.test, "o", True), (one.test_all, "s", False)):
            if not filled and one.blocks == 1:
                continue
            axes.errorbar(
                one.cost.time,
                one.error(shown.mean),
                yerr=measure.scale * (shown.error or 0.0),
                color=colour,
                marker=marker,
                markersize=6,
                markerfacecolor=colour if filled else "white",
                linestyle="",
                label=label if filled else None,
            )
        axes.annotate(
            str(k + 1), (one.cost.time, one.error(one.test.mean)), (5, 4), textcoords="offset points", fontsize=8
        )
    best = front(points)
    errors = [one.error(one.chosen.mean) for one in best]
    axes.step(
        [one.cost.time for one in best], errors, where="post", color="#888888", marker="", zorder=0, label="front"
    )
    figure.legend(
        loc="outside right upper", fontsize="x-small", title="filled: last exit, open: all", title_fontsize="x-small"
    )
    for kind in ("svg", "png"):
        outputs.write(
            folder / f"study.{kind}",
            lambda part, kind=kind: figure.savefig(
                part, format=kind, dpi=150, metadata={"Date": None} if kind == "svg" else {}
            ),
        )
