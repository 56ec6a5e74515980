"""Plots of runs: one panel each, large enough for a phone."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from statistics import mean
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from blocklocal.lab.groups import Group
from blocklocal.lab.history import History

# Okabe and Ito's colours, which the colour-blind too can tell apart.
COLOURS = ("#222222", "#d55e00", "#e69f00", "#56b4e9", "#0072b2", "#009e73", "#cc79a7", "#8c6d31")
STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "lines.linewidth": 1.8,
    "lines.marker": "o",
    "lines.markersize": 3.5,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "svg.fonttype": "none",  # text stays text: a third of the size, and it can be searched
    "svg.hashsalt": "blocklocal",
}
WIDTH, HEIGHT = 4.8, 3.4  # inches


@dataclass(frozen=True)
class Plot:
    """name: of its files. caption: what it shows, also for those who do not see it."""

    name: str
    caption: str
    figure: Figure

    @cached_property
    def png(self) -> bytes:
        return self._render("png", metadata={})

    @cached_property
    def svg(self) -> bytes:
        return self._render("svg", metadata={"Date": None})  # the same plot gives the same bytes

    @matplotlib.rc_context(STYLE)
    def _render(self, kind: str, *, metadata: dict[str, None]) -> bytes:
        buffer = io.BytesIO()
        self.figure.savefig(buffer, format=kind, dpi=150, metadata=metadata)
        return buffer.getvalue()


@dataclass(frozen=True)
class Line:
    """A value of every epoch's record, in the mean over a group's runs."""

    group: Group
    value: Callable[[dict[str, Any]], float]
    label: str
    colour: Any
    style: str = "-"


def choose_colours(groups: Sequence[Group]) -> dict[str, str]:
    """One for each label, so that a rule looks the same in all plots."""
    labels = dict.fromkeys(group.label for group in groups)
    return {label: COLOURS[k % len(COLOURS)] for k, label in enumerate(labels)}


def compare_groups(groups: Sequence[Group], *, colours: Mapping[str, str]) -> list[Plot]:
    """The groups of one subject: accuracy over epochs and against time, and the loss of the last block."""
    subject, exit_ = groups[0].subject, "accuracy of the last exit, %"

    def lines(value: Callable[[dict[str, Any]], float]) -> list[Line]:
        return [Line(group, value, _label(group), colours[group.label]) for group in groups]

    return [
        Plot(
            _name("accuracy", subject),
            "Accuracy of the last exit on the test images: mean over seeds, and their range as a shade.",
            _over_epochs(
                lines(lambda record: 100 * record["test_accuracy"][-1]), title=f"Accuracy, {subject}", y=exit_
            ),
        ),
        Plot(
            _name("time", subject),
            "The same against the seconds of training, without tests: a line for each run.",
            _against_time(groups, title=f"Accuracy against time, {subject}", y=exit_, colours=colours),
        ),
        Plot(
            _name("loss", subject),
            "Loss of the last block on the training images, mean over the epoch.",
            _over_epochs(
                lines(lambda record: record["train_loss"][-1]),
                title=f"Training loss, {subject}",
                y="loss of the last block",
            ),
        ),
    ]


def show_blocks(group: Group) -> list[Plot]:
    """What happens in the blocks of one group and at their borders."""
    name, shades = f"{group.subject}, {group.label}", _shades(group.blocks)

    def lines(what: str, value: Callable[[dict[str, Any], int], float], *, count: int) -> list[Line]:
        return [Line(group, lambda r, k=k: value(r, k), f"{what} {k}", shades[k]) for k in range(count)]

    exits = lines("block", lambda record, k: 100 * record["test_accuracy"][k], count=group.blocks)
    exits.append(Line(group, lambda record: 100 * record["test_accuracy_all"], "all exits", "#222222", "--"))
    losses = lines("block", lambda record, k: record["train_loss"][k], count=group.blocks)
    agreements = lines("border", lambda record, k: record["borders"][k]["agreement"], count=group.blocks - 1)
    ratios = lines("border", lambda record, k: record["borders"][k]["variance_ratio"], count=group.blocks - 1)
    return [
        Plot(
            _name("exits", name),
            "Accuracy of the exit of each block, and of all exits combined.",
            _over_epochs(exits, title=f"Exits, {name}", y="test accuracy, %"),
        ),
        Plot(
            _name("local", name),
            "Local loss of each block on the training images, each on a scale of its own.",
            _stacked(losses, title=f"Local losses, {name}"),
        ),
        Plot(
            _name("agreement", name),
            "How well the forward and the feedback message agree at each border.",
            _over_epochs(agreements, title=f"Agreement, {name}", y="mean cosine of alpha and beta", low=0, high=1),
        ),
        Plot(
            _name("variance", name),
            "How well the output of each block tells the classes apart; near zero it has collapsed.",
            _over_epochs(ratios, title=f"Variance ratio, {name}", y="between classes / within", low=0),
        ),
    ]


@matplotlib.rc_context(STYLE)
def _over_epochs(
    lines: Sequence[Line], *, title: str, y: str, low: float | None = None, high: float | None = None
) -> Figure:
    """low, high: values that the axis reaches at least."""
    figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
    axes = figure.add_subplot(title=title, xlabel="epoch", ylabel=y)
    for line in lines:
        _draw(axes, line)
    bottom, top = axes.get_ylim()
    axes.set_ylim(bottom if low is None else min(bottom, low), top if high is None else max(top, high))
    _count_epochs(axes)
    axes.legend(handlelength=1.4)
    return figure


@matplotlib.rc_context(STYLE)
def _against_time(groups: Sequence[Group], *, title: str, y: str, colours: Mapping[str, str]) -> Figure:
    figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
    axes = figure.add_subplot(title=title, xlabel="seconds of training", ylabel=y)
    for group in groups:
        for k, run in enumerate(group.counted):
            seconds, accuracies = _course(run)
            axes.plot(seconds, accuracies, color=colours[group.label], label=None if k else _label(group))
    axes.legend(handlelength=1.4)
    return figure


@matplotlib.rc_context(STYLE)
def _stacked(lines: Sequence[Line], *, title: str) -> Figure:
    """A panel for each line, one below the other."""
    figure = Figure(figsize=(WIDTH, max(HEIGHT, 0.9 + 0.7 * len(lines))), layout="constrained")
    panels = figure.subplots(len(lines), 1, sharex=True, squeeze=False)[:, 0]
    panels[0].set_title(title)
    for axes, line in zip(panels, lines, strict=True):
        _draw(axes, line)
        axes.set_ylabel(line.label)
        axes.yaxis.set_major_locator(MaxNLocator(nbins=3))
        axes.ticklabel_format(axis="y", useOffset=False)
    panels[-1].set_xlabel("epoch")
    _count_epochs(panels[-1])
    return figure


def _draw(axes: Axes, line: Line) -> None:
    """Where runs are not equally long, each epoch has those that have come so far."""
    runs = [[line.value(record) for record in run.records] for run in line.group.counted]
    columns = [[run[i] for run in runs if i < len(run)] for i in range(max(map(len, runs)))]
    epochs = range(1, len(columns) + 1)
    axes.plot(epochs, [mean(column) for column in columns], linestyle=line.style, color=line.colour, label=line.label)
    if len(runs) > 1:
        low, high = [min(column) for column in columns], [max(column) for column in columns]
        axes.fill_between(epochs, low, high, color=line.colour, alpha=0.15, linewidth=0)


def _count_epochs(axes: Axes) -> None:
    """Whole numbers on the horizontal axis, for a single epoch too."""
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True, min_n_ticks=1))
    first, last = axes.get_xlim()
    axes.set_xlim(min(first, 0.8), max(last, 1.2))


def _course(run: History) -> tuple[list[float], list[float]]:
    """Seconds since the start and accuracy in %, after each epoch."""
    seconds = list(accumulate(float(record["seconds"]) for record in run.records))
    return seconds, [100 * accuracy for accuracy in run.accuracies]


def _label(group: Group) -> str:
    return group.label if any(run.finished for run in group.runs) else f"{group.label} (unfinished)"


def _name(what: str, subject: str) -> str:
    words = "".join(letter if letter.isalnum() or letter in "._" else " " for letter in f"{what} {subject}").split()
    return "-".join(words)


def _shades(count: int) -> list[tuple[float, ...]]:
    """From the first block to the last, dark to light."""
    return [matplotlib.colormaps["viridis"](0.85 * k / max(count - 1, 1)) for k in range(count)]
