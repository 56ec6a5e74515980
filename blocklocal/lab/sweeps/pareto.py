"""The results of a study: error against cost, and the settings that none beats at their cost."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

import matplotlib
from matplotlib.figure import Figure
from rich.table import Table

from blocklocal.lab import outputs
from blocklocal.lab.bench.step_cost import Cost
from blocklocal.lab.names import plain, sentence, short
from blocklocal.lab.report.figures import STYLE
from blocklocal.lab.runs.history import History
from blocklocal.lab.terminal import Terminal


@dataclass(frozen=True)
class Estimate:
    """The mean over runs with its standard error s / √n, which needs two runs."""

    mean: float
    error: float | None

    @staticmethod
    def of(values: Sequence[float]) -> Estimate:
        return Estimate(mean(values), stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None)

    def __str__(self) -> str:
        return f"{100 * self.mean:.2f}" + ("" if self.error is None else f" ± {100 * self.error:.2f}")


@dataclass(frozen=True)
class Point:
    """The result of a row of the grid. Accuracies are fractions of images after the last epoch: of the last exit, and
    of all exits combined with weights from the validation images. cost: of a step, or of a run that trains longer."""

    name: str
    runs: int
    blocks: int
    validation: Estimate
    validation_all: Estimate
    test: Estimate
    test_all: Estimate
    cost: Cost

    @property
    def best(self) -> float:
        """The validation accuracy for choosing rows: that of the better predictor."""
        return max(self.validation.mean, self.validation_all.mean)


def point(name: str, runs: Sequence[History], *, cost: Cost) -> Point:
    """The result of finished runs, which differ in their seed."""
    last = [run.records[-1] for run in runs]
    return Point(
        name,
        runs=len(runs),
        blocks=len(last[0]["test_accuracy"]),
        validation=Estimate.of([record["validation_accuracy"][-1] for record in last]),
        validation_all=Estimate.of([record["validation_accuracy_all"] for record in last]),
        test=Estimate.of([record["test_accuracy"][-1] for record in last]),
        test_all=Estimate.of([record["test_accuracy_all"] for record in last]),
        cost=cost,
    )


def front(points: Sequence[Point]) -> list[Point]:
    """The Pareto front: results that none beats in validation accuracy at the same or less time, cheapest first."""
    kept: list[Point] = []
    for one in sorted(points, key=lambda one: (one.cost.time, -one.best)):
        if not kept or one.best > kept[-1].best:
            kept.append(one)
    return kept


def print_table(points: Sequence[Point], *, title: str) -> None:
    """Print the results to standard output; a star marks the front."""
    chosen = front(points)
    table = Table(
        title=sentence(title),
        caption="accuracy in %, mean ± standard error; time (of the processor), operations, memory: of bp's training "
        "step; *: nothing is better on the validation images in the same time",
        title_justify="left",
        caption_justify="left",
    )
    table.add_column("settings")
    for name in ("", "validation", "all exits", "test", "all exits", "time", "operations", "memory", "runs"):
        table.add_column(name, justify="right")
    for one in points:
        combined = (str(one.validation_all), str(one.test_all)) if one.blocks > 1 else ("", "")
        table.add_row(
            short(plain(one.name)),
            "*" if one in chosen else "",
            str(one.validation),
            combined[0],
            str(one.test),
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
    axes = figure.add_subplot(
        title=plain(short(title)), xlabel="processor time of training, bp = 1", ylabel="test error, %"
    )
    for k, one in enumerate(points):
        colour, label = f"C{k % 10}", f"{k + 1} {short(plain(one.name))}".replace("\n", " ")
        for shown, marker, filled in ((one.test, "o", True), (one.test_all, "s", False)):
            if not filled and one.blocks == 1:
                continue
            axes.errorbar(
                one.cost.time,
                100 * (1 - shown.mean),
                yerr=100 * (shown.error or 0.0),
                color=colour,
                marker=marker,
                markersize=6,
                markerfacecolor=colour if filled else "white",
                linestyle="",
                label=label if filled else None,
            )
        axes.annotate(
            str(k + 1), (one.cost.time, 100 * (1 - one.test.mean)), (5, 4), textcoords="offset points", fontsize=8
        )
    best = front(points)
    errors = [
        100 * (1 - (one.test if one.validation.mean >= one.validation_all.mean else one.test_all).mean) for one in best
    ]
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
