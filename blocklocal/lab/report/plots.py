"""The plots of a report: their content, colours and file names."""

from __future__ import annotations

import io
import math
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import MultipleLocator

from blocklocal.lab.names import NAME
from blocklocal.lab.report.figures import STYLE, Line, against_time, over_epochs, stacked
from blocklocal.lab.report.seed_groups import Group
from blocklocal.lab.tasks.measure import ACCURACY, Measure

# Okabe and Ito's palette, which is suitable for colour-blind readers.
COLOURS = ("#222222", "#d55e00", "#e69f00", "#56b4e9", "#0072b2", "#009e73", "#cc79a7", "#8c6d31")


@dataclass(frozen=True)
class Plot:
    """A plot. name: of its files. caption: what it shows, also as alternative text."""

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


def choose_colours(groups: Sequence[Group]) -> dict[str, str]:
    """A colour for each label, so that a rule looks the same in all plots."""
    labels = dict.fromkeys(group.label for group in groups)
    return {label: COLOURS[k % len(COLOURS)] for k, label in enumerate(labels)}


def compare_groups(groups: Sequence[Group], *, colours: Mapping[str, str]) -> list[Plot]:
    """Plots of the groups of one subject: test results over epochs and time, and the loss of the last block."""
    subject, measure = groups[0].subject, groups[0].measures[-1]
    name, exit_ = _title(measure), _axis(f"{measure.label} of the last exit", measure)

    def lines(value: Callable[[dict[str, Any]], float]) -> list[Line]:
        return [Line(group, value, _label(group), colours[group.label]) for group in groups]

    tests = lines(lambda record: measure.scale * measure.exit(record))
    losses = lines(lambda record: record["train_loss"][-1])
    return [
        Plot(
            _name(measure.name if measure is ACCURACY else "test", subject),
            f"{name} of the last exit on the test samples: mean over seeds, and their range as a shade.",
            over_epochs(tests, title=f"{name}, {subject}", y=exit_),
        ),
        Plot(
            _name("time", subject),
            "The same against the seconds of training, without tests: a line for each run.",
            against_time(tests, title=f"{name} against time, {subject}", y=exit_),
        ),
        Plot(
            _name("loss", subject),
            "Loss of the last block on the training samples, mean over the epoch.",
            over_epochs(losses, title=f"Training loss, {subject}", y="loss of the last block"),
        ),
    ]


def show_group(group: Group) -> list[Plot]:
    """Plots of the inside of one group: its blocks, and its layers if their gradients are not the true ones."""
    return [*(_show_blocks(group) if group.blocks > 1 else ()), *_show_angles(group)]


def _show_blocks(group: Group) -> list[Plot]:
    """Plots of the blocks and their borders."""
    name, shades = f"{group.subject}, {group.label}", _shades(group.blocks)

    def lines(what: str, value: Callable[[dict[str, Any], int], float], *, count: int) -> list[Line]:
        return [Line(group, lambda r, k=k: value(r, k), f"{what} {k}", shades[k]) for k in range(count)]

    measure = group.measures[-1]
    exits = lines("block", lambda record, k: measure.scale * measure.exit(record, k), count=group.blocks)
    exits.append(Line(group, lambda record: measure.scale * measure.combined(record), "all exits", "#222222", "--"))
    losses = lines("block", lambda record, k: record["train_loss"][k], count=group.blocks)
    agreements = lines("border", lambda record, k: record["borders"][k]["agreement"], count=group.blocks - 1)
    ratios = lines("border", lambda record, k: record["borders"][k]["variance_ratio"], count=group.blocks - 1)
    return [
        Plot(
            _name("exits", name),
            f"{_title(measure)} of the exit of each block, and of all exits combined.",
            over_epochs(exits, title=f"Exits, {name}", y=_axis(f"test {measure.label}", measure)),
        ),
        Plot(
            _name("local", name),
            "Local loss of each block on the training samples, each on a scale of its own.",
            stacked(losses, title=f"Local losses, {name}"),
        ),
        Plot(
            _name("agreement", name),
            "How well the forward and the feedback message agree at each border.",
            over_epochs(agreements, title=f"Agreement, {name}", y="mean cosine of alpha and beta", low=0, high=1),
        ),
        Plot(
            _name("variance", name),
            "How well the output of each block tells the targets apart; near zero it has collapsed.",
            over_epochs(ratios, title=f"Variance ratio, {name}", y="between targets / within", low=0),
        ),
    ]


def _show_angles(group: Group) -> list[Plot]:
    """A plot of the angles in the records, which feedback alignment and its variants have."""
    records = [record for run in group.counted for record in run.records]
    layers = list(dict.fromkeys(layer for record in records for layer in record.get("angles", ())))
    if not layers:
        return []
    name = f"{group.subject}, {group.label}"
    lines = [
        Line(group, lambda record, layer=layer: record.get("angles", {}).get(layer, math.nan), layer, shade)
        for layer, shade in zip(layers, _shades(len(layers)), strict=True)
    ]
    caption = (
        "Degrees between the gradient of the rule and the true one for the weights of each layer, dark for the first, "
        "light for the last; at the end of an epoch, on its first minibatch. Below 90 a small step lowers the loss."
    )
    figure = over_epochs(lines, title=f"Angles, {name}", y="degrees to the true gradient", low=0, high=95, mark=90)
    figure.axes[0].yaxis.set_major_locator(MultipleLocator(30))
    return [Plot(_name("angles", name), caption, figure)]


def _title(measure: Measure) -> str:
    return measure.label[0].upper() + measure.label[1:]


def _axis(what: str, measure: Measure) -> str:
    return f"{what}, {measure.unit}" if measure.unit else what


def _label(group: Group) -> str:
    return group.label if any(run.finished for run in group.runs) else f"{group.label} (unfinished)"


def _name(what: str, subject: str) -> str:
    """Of files: words of letters, with a number where that, or its length, could make two subjects one."""
    words = re.findall(r"[\w.]+", f"{what} {subject}", re.ASCII)
    told = " ".join(words) == f"{what} {subject}".replace(",", "").replace("-", " ") and len(subject) <= NAME
    name = "-".join(words)
    return name if told else f"{name[:NAME]}-{zlib.crc32(subject.encode(errors='surrogateescape')):08x}"


def _shades(count: int) -> list[tuple[float, ...]]:
    """Colours from dark to light, from the first to the last."""
    return [matplotlib.colormaps["viridis"](0.85 * k / max(count - 1, 1)) for k in range(count)]
