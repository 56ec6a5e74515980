"""Shows the records of a comparison as tables."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from blocklocal.lab.bench import profile


def tables(result: dict[str, Any]) -> list[Table]:
    """Time, memory and, if requested, the most expensive operations; one row per rule."""
    options, device = result["options"], result["device"]
    place = f"cpu, {device['threads']} threads" if device["type"] == "cpu" else device["name"]
    title = f"{options['model']}, {options['batch_size']} images per step, {options['dtype']}, {place}"
    time = _table(
        ["seconds per step", "least", "most", "images/s", "time", "processor", "flops"],
        caption="time, processor, flops: ratios to bp of seconds, of the processor's seconds, and of operations "
        "in matrix products and convolutions",
        title=title,
    )
    memory = _table(
        ["alive", "of bp", "allocated", "of bp", "state", "total", "process"],
        caption="alive, allocated: the most MiB that a step adds, as tensors and from the allocator, including the "
        "workspace inside operations; state: MiB of parameters, buffers and optimizer state; total: alive + state, "
        "as a ratio to bp; process: MiB of resident memory that a step adds" + _remarks(result["rules"]),
    )
    for label, found in result["rules"].items():
        time.add_row(
            label,
            *(f"{found[key]:.3g}" for key in ("seconds_per_step", "seconds_min", "seconds_max")),
            f"{found['images_per_second']:,.0f}",
            *(f"{found[key]:.3f}" for key in ("time_ratio", "processor_time_ratio", "flops_ratio")),
        )
        growth = found["resident_growth_bytes"]
        memory.add_row(
            label,
            f"{found['memory_bytes'] / 2**20:,.1f}",
            f"{found['memory_ratio']:.3f}",
            f"{found['allocated_bytes'] / 2**20:,.1f}",
            f"{found['allocated_ratio']:.3f}",
            f"{found['state_bytes'] / 2**20:,.1f}",
            f"{found['total_ratio']:.3f}",
            "" if growth is None else f"+{growth / 2**20:,.0f}",
        )
    dearest = [(label, found["operations"]) for label, found in result["rules"].items() if "operations" in found]
    return [time, memory, *(profile.table(label, found) for label, found in dearest)]


def _table(columns: list[str], *, caption: str, title: str | None = None) -> Table:
    rows = Table(
        title=title,
        caption=caption,
        title_justify="left",
        caption_justify="left",
        box=None,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    rows.add_column("rule", no_wrap=True)
    for column in columns:
        rows.add_column(column, justify="right", no_wrap=True)
    return rows


def _remarks(records: dict[str, Any]) -> str:
    lines = []
    for label, found in records.items():
        whole = records.get(label.replace("bll", "bll-sum", 1)) if found["rule"] == "bll" else None
        if whole:
            share = found["memory_bytes"] / whole["memory_bytes"]
            lines.append(f"\n{label}: {share:.3f} of the memory of one backward pass of the sum of its losses")
        if found["compile_seconds"] is not None:
            lines.append(f"\n{label}: {found['compile_seconds']:.0f} s of compilation before")
    return "".join(lines)
