"""Shows a timeline as a table, a picture, and a trace for a viewer."""

from __future__ import annotations

from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from rich.table import Table

from blocklocal.pipeline.analysis.timeline import Timeline
from blocklocal.pipeline.trace import Record


def table(timeline: Timeline) -> Table:
    """One row per rank; shares are of the time from its first forward pass to its last backward pass."""
    rows = Table("rank", "blocks")
    for column in ("busy per minibatch", "busy", "waiting"):
        rows.add_column(column, justify="right")
    for rank, seconds in zip(timeline.ranks, timeline.stage_seconds, strict=True):
        rows.add_row(
            str(rank),
            ", ".join(map(str, timeline.blocks(rank))),
            f"{1e3 * seconds:.1f} ms",
            f"{timeline.utilisation(rank):.1%}",
            f"{timeline.waiting(rank):.1%}",
        )
    return rows


def summary(timeline: Timeline) -> list[str]:
    copies = timeline.sizes("copy")
    against = f"copies against the stream: {len(copies)}, of {sum(copies) / 2**20:,.2f} MiB together"
    return [
        f"fill: {1e3 * timeline.fill:.1f} ms until the last rank begins",
        f"imbalance: {timeline.imbalance:.2f} (longest over mean time per minibatch)",
        f"throughput: {timeline.throughput:.2f} minibatches/s; the slowest rank allows "
        f"{timeline.predicted_throughput:.2f}",
        *([against] if copies else []),
    ]


def draw(timeline: Timeline, *, minibatches: int = 0) -> Figure:
    """A row per rank, a colour per block: forward pass light, local backward pass dark, waiting left blank."""
    first = min(record.minibatch for record in timeline.records)
    shown = [r for r in timeline.records if not minibatches or r.minibatch < first + minibatches]
    begin = min(record.start for record in shown if record.phase == "forward")
    blocks = sorted({record.block for record in shown})
    figure = Figure(figsize=(11, 0.8 + 0.5 * len(timeline.ranks)))
    axes = figure.add_subplot()
    for record in shown:
        if record.phase in ("forward", "backward"):
            span = (1e3 * (record.start - begin), 1e3 * record.seconds)
            axes.broken_barh([span], (record.rank - 0.4, 0.8), color=_colour(record), linewidth=0)
    for message, arrival in timeline.messages():
        if message in shown and arrival in shown:
            times = [1e3 * (message.end - begin), 1e3 * (arrival.start - begin)]
            style = ":" if message.phase == "copy" else "-"
            axes.plot(times, [message.rank, arrival.rank], style, color="black", linewidth=0.5)
    axes.set_yticks(timeline.ranks, [f"rank {rank}" for rank in timeline.ranks])
    axes.invert_yaxis()
    axes.set_xlabel("milliseconds")
    axes.spines[["top", "right", "left"]].set_visible(False)
    handles = [Patch(color=mpl.colormaps["tab10"](k % 10), label=f"block {k}") for k in blocks]
    axes.legend(handles=handles, ncols=len(handles), loc="lower left", bbox_to_anchor=(0, 1), frameon=False)
    return figure


def chrome_trace(timeline: Timeline) -> dict[str, Any]:
    """The timeline for a trace viewer: a process per rank, a row per block, an arrow per message; microseconds."""
    begin = min(record.start for record in timeline.records)
    events: list[dict[str, Any]] = [
        {"ph": "M", "name": "process_name", "pid": rank, "args": {"name": f"rank {rank}"}} for rank in timeline.ranks
    ]
    for record in timeline.records:
        place = {"pid": record.rank, "tid": record.block}
        span = {"ts": 1e6 * (record.start - begin), "dur": 1e6 * record.seconds}
        name = f"{record.phase} {record.minibatch}"
        events.append({"ph": "X", "name": name, "cat": record.phase, **place, **span})
    for i, (message, arrival) in enumerate(timeline.messages()):
        name = "copy" if message.phase == "copy" else "message"
        common = {"name": name, "cat": name, "id": i, "args": {"bytes": message.size}}
        sent, taken = 1e6 * (message.start - begin), 1e6 * (arrival.start - begin)
        events.append({"ph": "s", **common, "pid": message.rank, "tid": message.block, "ts": sent})
        events.append({"ph": "f", "bp": "e", **common, "pid": arrival.rank, "tid": arrival.block, "ts": taken})
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def _colour(record: Record) -> tuple[float, float, float]:
    red, green, blue, _ = mpl.colormaps["tab10"](record.block % 10)
    if record.phase == "backward":
        return red, green, blue
    return (1 + red) / 2, (1 + green) / 2, (1 + blue) / 2
