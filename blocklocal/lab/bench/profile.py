"""Where the time of a step goes: the operations (kernels, on a GPU) that take the most of it."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

import torch
from rich.table import Table
from torch.profiler import ProfilerActivity, profile


def profiler(**options: Any) -> profile:
    """A torch.profiler.profile that does not report each start and stop on standard error."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # read when the first profiler of a process starts
    return profile(acc_events=True, **options)


def most_expensive(step: Callable[[], None], *, device: torch.device, count: int = 10) -> list[dict[str, Any]]:
    """name, calls, seconds and share of the step's total for the `count` most expensive operations of one step.

    Time is that of the operation itself, without the operations it calls; on CUDA it is device time.
    """
    cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profiler(activities=activities) as profiled:
        step()
        if cuda:
            torch.cuda.synchronize(device)
    events = profiled.key_averages()
    seconds = {
        event.key: (event.self_device_time_total if cuda else event.self_cpu_time_total) / 1e6 for event in events
    }
    calls = {event.key: event.count for event in events}
    total = sum(seconds.values())
    names = sorted(seconds, key=seconds.__getitem__, reverse=True)[:count]
    return [
        {"name": name, "calls": calls[name], "seconds": seconds[name], "share": seconds[name] / total} for name in names
    ]


def table(label: str, operations: list[Mapping[str, Any]]) -> Table:
    """One row per operation."""
    rows = Table(
        title=f"{label}: the most expensive operations of a step", title_justify="left", box=None, pad_edge=False
    )
    rows.add_column("operation", max_width=50, overflow="ellipsis", no_wrap=True)
    for column in ("calls", "ms", "share"):
        rows.add_column(column, justify="right", no_wrap=True)
    for found in operations:
        rows.add_row(found["name"], str(found["calls"]), f"{1000 * found['seconds']:,.2f}", f"{found['share']:.1%}")
    return rows
