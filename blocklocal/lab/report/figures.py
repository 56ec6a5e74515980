"""The kinds of figures in which plots of runs are drawn: one panel each, large enough for a phone."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from statistics import mean
from textwrap import fill
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from blocklocal.lab.names import NAME, plain, short
from blocklocal.lab.report.seed_groups import Group

STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.size": 10,
    "figure.titlesize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "lines.linewidth": 1.8,
    "lines.marker": "o",
    "lines.markersize": 3.5,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "text.parse_math": False,  # a dollar in a name is a dollar
    "svg.fonttype": "none",  # text stays text: a third of the size, and it can be searched
    "svg.hashsalt": "blocklocal",
}
WIDTH, HEIGHT = 4.8, 3.4  # inches
INSIDE, NAMED = 4, 12  # up to 4 lines are named inside the panel; of more, up to 12 are named outside it
BESIDE, TITLE = 16, 56  # characters of a name beside the panel, longer ones stand below it; of a line of the title


@dataclass(frozen=True)
class Line:
    """A value from the record of every epoch, averaged over the runs of a group; nan if a record does not have it."""

    group: Group
    value: Callable[[dict[str, Any]], float]
    label: str
    colour: Any
    style: str = "-"


@matplotlib.rc_context(STYLE)
def over_epochs(
    lines: Sequence[Line],
    *,
    title: str,
    y: str,
    low: float | None = None,
    high: float | None = None,
    mark: float | None = None,
) -> Figure:
    """The vertical axis. low, high: values that it must include. mark: a value marked by a line."""
    figure = _titled(title)
    axes = figure.add_subplot(xlabel="epoch", ylabel=y)
    for line in lines:
        _draw(axes, line)
    bottom, top = axes.get_ylim()
    axes.set_ylim(bottom if low is None else min(bottom, low), top if high is None else max(top, high))
    if mark is not None:
        axes.axhline(mark, color="#222222", linewidth=1, linestyle="--", marker="")
    _count_epochs(axes)
    _name(axes, figure)
    return figure


@matplotlib.rc_context(STYLE)
def against_time(lines: Sequence[Line], *, title: str, y: str) -> Figure:
    """A panel over the seconds of training, with a line for each run."""
    figure = _titled(title)
    axes = figure.add_subplot(xlabel="seconds of training", ylabel=y)
    for line in lines:
        for k, run in enumerate(line.group.counted):
            seconds = list(accumulate(float(record["seconds"]) for record in run.records))
            values = [line.value(record) for record in run.records]
            axes.plot(seconds, values, color=line.colour, label=None if k else _shown(line.label))
    _name(axes, figure)
    return figure


@matplotlib.rc_context(STYLE)
def stacked(lines: Sequence[Line], *, title: str) -> Figure:
    """A panel for each line, one below another."""
    figure = _titled(title, height=max(HEIGHT, 0.9 + 0.7 * len(lines)))
    panels = figure.subplots(len(lines), 1, sharex=True, squeeze=False)[:, 0]
    for axes, line in zip(panels, lines, strict=True):
        _draw(axes, line)
        axes.set_ylabel(_shown(line.label))
        axes.yaxis.set_major_locator(MaxNLocator(nbins=3))
        axes.ticklabel_format(axis="y", useOffset=False)
    panels[-1].set_xlabel("epoch")
    _count_epochs(panels[-1])
    return figure


def _titled(title: str, *, height: float = HEIGHT) -> Figure:
    """A figure whose title may take several lines: a legend beside the panels leaves room for it."""
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    figure.suptitle(fill(_shown(title, longest=2 * TITLE), TITLE), x=0.01, ha="left")
    return figure


def _draw(axes: Axes, line: Line) -> None:
    """The values of each epoch, from the runs that have reached it."""
    runs = [[line.value(record) for record in run.records] for run in line.group.counted]
    columns = [[run[i] for run in runs if i < len(run)] for i in range(max(map(len, runs)))]
    known = [[value for value in column if not math.isnan(value)] or [math.nan] for column in columns]
    epochs = range(1, len(columns) + 1)
    values, label = [mean(column) for column in known], _shown(line.label)
    axes.plot(epochs, values, linestyle=line.style, color=line.colour, label=label)
    if len(runs) > 1:
        low, high = [min(column) for column in known], [max(column) for column in known]
        axes.fill_between(epochs, low, high, color=line.colour, alpha=0.15, linewidth=0)


def _shown(name: str, *, longest: int = NAME) -> str:
    """A label that is safe in a legend, which leaves out those that begin with an underscore."""
    return plain(short(name, longest=longest)).replace("\n", " ").lstrip("_")


def _count_epochs(axes: Axes) -> None:
    """Show whole numbers on the horizontal axis, even for a single epoch."""
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True, min_n_ticks=1))
    first, last = axes.get_xlim()
    axes.set_xlim(min(first, 0.8), max(last, 1.2))


def _name(axes: Axes, figure: Figure) -> None:
    handles, labels = axes.get_legend_handles_labels()
    if len(handles) <= INSIDE:
        axes.legend(handlelength=1.4)
        return
    count = min(len(handles), NAMED)
    chosen = [round(k * (len(handles) - 1) / (count - 1)) for k in range(count)]
    below = max(len(labels[k]) for k in chosen) > BESIDE
    if below:
        figure.set_figheight(HEIGHT + 0.2 * count)
    figure.legend(
        [handles[k] for k in chosen],
        [labels[k] for k in chosen],
        loc="outside lower left" if below else "outside right upper",
        fontsize="x-small",
        handlelength=1.4,
    )
