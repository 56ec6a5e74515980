"""`bll bench`: time and memory of one training step, rule by rule, on the same model, batch and machine."""

from __future__ import annotations

import importlib
import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from blocklocal.lab import models
from blocklocal.lab.arguments import parse
from blocklocal.lab.bench import profile, scaling
from blocklocal.lab.bench.baselines import IN_BLOCKS, contender
from blocklocal.lab.bench.measure import Measurement, Watch, measure_all, ratio
from blocklocal.lab.bench.memory_plot import plot
from blocklocal.lab.bench.options import Options
from blocklocal.lab.environment import describe, find_device
from blocklocal.lab.outputs import check_picture
from blocklocal.lab.terminal import Terminal

PIPELINE = "--pipeline"


def main(args: Sequence[str]) -> None:
    if PIPELINE in args:  # imported here only, since it needs the runtime of one version of torch
        importlib.import_module("blocklocal.lab.pipeline_bench.bench").main([arg for arg in args if arg != PIPELINE])
        return
    options = parse(Options, args, prog="bll bench")
    run, show = (scaling.scale, scaling.tables) if options.scale else (bench, tables)
    with Terminal(stderr=True).status("measuring") as status:
        result = run(options, watch=lambda what: status.update(f"measuring {what}"))
    for table in show(result):
        Terminal().print(table, end="\n\n")
    if options.json:
        print(json.dumps(result))


def bench(options: Options, *, watch: Watch = lambda _: None) -> dict[str, Any]:
    """What `bll bench --json` prints: the options, the machine, and under "rules" one record per rule.

    A rule in several numbers of blocks K has a record each, named RULE/K. UserError: options that cannot be used.
    """
    options.check()
    if options.plot:
        check_picture(Path(options.plot), flag="--plot")
    device = find_device(options.device)
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    size = (options.size, options.size)
    model = models.build(options.model, channels=options.channels, size=size, classes=options.classes)
    work = options.workload(model, batch_size=options.batch_size, device=device)
    contenders = {}
    for rule in dict.fromkeys(["bp", *options.rules.split(",")]):
        for k in options.ks if rule in IN_BLOCKS else [1]:
            label = f"{rule}/{k}" if rule in IN_BLOCKS and len(options.ks) > 1 else rule
            watch(f"blocks of {label}")
            contenders[label] = contender(rule, work, blocks=k)
    measured = measure_all(
        contenders, device=device, rounds=options.steps, warmup=options.warmup, compiled=options.compile, watch=watch
    )
    records = {label: record(m, bp=measured["bp"], images=options.batch_size) for label, m in measured.items()}
    shown = [label for label, made in contenders.items() if made.rule in ("bp", "bll")]
    if options.plot:
        footprints = {label: measured[label].footprint for label in shown}
        plot(footprints, Path(options.plot), title=f"{options.model}, {options.batch_size} images")
    if options.operations:
        for label in shown:
            watch(f"operations of {label}")
            records[label]["operations"] = profile.dearest(contenders[label].step, device=device)
    return {"options": asdict(options), **describe(device), "rules": records}


def record(measurement: Measurement, *, bp: Measurement, images: int) -> dict[str, Any]:
    """Time and memory as plain values, with ratios to backpropagation.

    time_ratio: the median over rounds of the quotient within a round, so that a machine which is slow for a while is so
    for both. memory_bytes, allocated_bytes: what a step adds to what is there before it, as tensors alive and as bytes
    of the allocator, see `footprint`. state_bytes: parameters, buffers, optimizer state. total_ratio: of memory_bytes +
    state_bytes.
    """
    footprint = measurement.footprint
    memory, reference = footprint.alive, bp.footprint.alive
    return {
        "rule": measurement.contender.rule,
        "blocks": measurement.contender.blocks,
        "seconds_per_step": measurement.median,
        "seconds_min": min(measurement.seconds),
        "seconds_max": max(measurement.seconds),
        "images_per_second": images / measurement.median,
        "time_ratio": ratio(measurement.seconds, bp.seconds),
        "processor_seconds_per_step": statistics.median(measurement.processor_seconds),
        "processor_time_ratio": ratio(measurement.processor_seconds, bp.processor_seconds),
        "flops": measurement.flops,
        "flops_ratio": measurement.flops / bp.flops,
        "compile_seconds": measurement.compile_seconds,
        "memory_bytes": memory,
        "memory_ratio": memory / reference,
        "allocated_bytes": measurement.allocated,
        "allocated_ratio": measurement.allocated / bp.allocated,
        "state_bytes": measurement.state_bytes,
        "total_ratio": (memory + measurement.state_bytes) / (reference + bp.state_bytes),
        "resident_peak_bytes": footprint.resident_peak,
        "resident_growth_bytes": footprint.resident_growth,
    }


def tables(result: dict[str, Any]) -> list[Table]:
    """Time, memory and, where they were asked for, the dearest operations; one row per rule."""
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
        caption="alive, allocated: MiB that a step adds at most, in tensors and from the allocator, there with the "
        "workspace inside operations; state: MiB of parameters, buffers and optimizer state; total: alive and state, "
        "of bp; process: MiB of resident memory that a step adds" + _remarks(result["rules"]),
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
