"""A picture of memory over the course of one training step."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from blocklocal.lab import outputs
from blocklocal.lab.bench.step_memory import StepMemory
from blocklocal.lab.names import plain, short


@matplotlib.rc_context({"text.parse_math": False})
def plot(step_memories: Mapping[str, StepMemory], file: Path, *, title: str) -> None:
    """Draw one panel per baseline, on a common scale; every second block is shaded."""
    figure = Figure(figsize=(1.5 + 3 * len(step_memories), 3.2), layout="constrained")
    panels = figure.subplots(1, len(step_memories), sharey=True, squeeze=False)[0]
    for panel, (label, step_memory) in zip(panels, step_memories.items(), strict=True):
        timeline = step_memory.timeline
        end = timeline.seconds[-1]
        shares = [seconds / end for seconds in timeline.seconds]
        panel.fill_between(shares, [size / 2**20 for size in timeline.bytes], step="post", linewidth=0)
        borders = [mark / end for mark in step_memory.marks[1:]] + [1.0]
        for first, last in list(pairwise(borders))[::2]:
            panel.axvspan(first, last, color="0.9", zorder=0)
        panel.axhline(timeline.peak / 2**20, color="black", linewidth=0.8, linestyle=":")
        panel.set(title=f"{label}: {timeline.peak / 2**20:,.0f} MiB", xlabel="share of the step", xlim=(0, 1))
    panels[0].set(ylabel="MiB alive", ylim=(0, None))
    figure.suptitle(plain(short(title)))
    file.parent.mkdir(parents=True, exist_ok=True)
    outputs.write(file, lambda part: figure.savefig(part, format=file.suffix[1:], dpi=130))
