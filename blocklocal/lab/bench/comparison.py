"""Compares rules on the same model, batch and machine: a record of time and memory for each."""

from __future__ import annotations

import statistics
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from blocklocal.lab import models
from blocklocal.lab.bench import profile
from blocklocal.lab.bench.baselines import baseline, in_blocks
from blocklocal.lab.bench.measure import Measurement, Watch, measure_all, ratio
from blocklocal.lab.bench.memory_plot import plot
from blocklocal.lab.bench.options import Options
from blocklocal.lab.environment import describe, find_device
from blocklocal.lab.outputs import check_picture


def bench(options: Options, *, watch: Watch = lambda _: None) -> dict[str, Any]:
    """Measure, and return what `bll bench --json` prints: options, machine, and under "rules" one record per rule.

    With several numbers of blocks K there is a record for each, named RULE/K. UserError: unusable options.
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
    baselines = {}
    for rule in dict.fromkeys(["bp", *options.rules.split(",")]):
        for k in options.ks if in_blocks(rule) else [1]:
            label = f"{rule}/{k}" if in_blocks(rule) and len(options.ks) > 1 else rule
            watch(f"blocks of {label}")
            baselines[label] = baseline(rule, work, blocks=k)
    measured = measure_all(
        baselines, device=device, rounds=options.steps, warmup=options.warmup, compiled=options.compile, watch=watch
    )
    records = {label: record(m, bp=measured["bp"], images=options.batch_size) for label, m in measured.items()}
    shown = [label for label, made in baselines.items() if made.rule in ("bp", "bll")]
    if options.plot:
        step_memories = {label: measured[label].step_memory for label in shown}
        plot(step_memories, Path(options.plot), title=f"{options.model}, {options.batch_size} images")
    if options.operations:
        for label in shown:
            watch(f"operations of {label}")
            records[label]["operations"] = profile.most_expensive(baselines[label].step, device=device)
    return {"options": asdict(options), **describe(device), "rules": records}


def record(measurement: Measurement, *, bp: Measurement, images: int) -> dict[str, Any]:
    """Time and memory as plain values, with ratios to backpropagation.

    time_ratio: the median over rounds of the ratio within a round, so that a temporary slowdown of the machine affects
    both. memory_bytes, allocated_bytes: what a step adds to the memory in use before it, as tensors alive and as bytes
    of the allocator, see `step_memory`. state_bytes: parameters, buffers, optimizer state. total_ratio: of
    memory_bytes + state_bytes.
    """
    step_memory = measurement.step_memory
    memory, reference = step_memory.alive, bp.step_memory.alive
    return {
        "rule": measurement.baseline.rule,
        "blocks": measurement.baseline.blocks,
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
        "resident_peak_bytes": step_memory.resident_peak,
        "resident_growth_bytes": step_memory.resident_growth,
    }
