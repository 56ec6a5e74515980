"""`bll bench --scale`: how time and memory of a step grow with the batch and with the depth of the network."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from rich.table import Table
from torch import nn

from blocklocal.lab import models
from blocklocal.lab.bench.baselines import baseline
from blocklocal.lab.bench.measure import Watch, measure_all
from blocklocal.lab.bench.options import Options
from blocklocal.lab.environment import describe, find_device
from blocklocal.lab.models.resnet import BasicBlock, ResNet

RULES = ("bp", "bll")
SHARES = (8, 4, 2, 1)  # of the batch
UNITS = (2, 4, 8)  # residual units in each of three stages: 6 n + 2 layers


def scale(options: Options, *, watch: Watch = lambda _: None) -> dict[str, Any]:
    """Fit exponents p of cost = c size^p for bp and bll, as the slope of a least-squares line through logarithms.

    batch: an eighth to all of the batch. depth: CIFAR ResNets of 14, 26 and 50 layers, whatever the model. bll has
    the first of the numbers of blocks. UserError: unusable options.
    """
    options.check()
    device = find_device(options.device)
    if options.threads:
        torch.set_num_threads(options.threads)
    cases = {(axis, size, rule): case for axis, size, case in _cases(options) for rule in RULES}
    baselines = {}
    for (axis, size, rule), (model, batch_size) in cases.items():
        work = options.workload(model, batch_size=batch_size, device=device)
        baselines[f"{rule} at {axis} {size}"] = baseline(rule, work, blocks=options.ks[0])
    measured = measure_all(
        baselines, device=device, rounds=options.steps, warmup=options.warmup, compiled=options.compile, watch=watch
    )
    axes: dict[str, dict[str, Any]] = {}
    for axis in dict.fromkeys(axis for axis, _, _ in cases):
        sizes = list(dict.fromkeys(size for other, size, _ in cases if other == axis))
        for rule in RULES:
            found = [measured[f"{rule} at {axis} {size}"] for size in sizes]
            seconds = [min(measurement.seconds) for measurement in found]
            processor = [min(measurement.processor_seconds) for measurement in found]
            memory = [measurement.step_memory.alive for measurement in found]
            axes.setdefault(axis, {})[rule] = {
                "sizes": sizes,
                "seconds_min": seconds,
                "memory_bytes": memory,
                "time_exponent": exponent(sizes, seconds),
                "processor_time_exponent": exponent(sizes, processor),
                "memory_exponent": exponent(sizes, memory),
            }
    return {"options": asdict(options), **describe(device), "axes": axes}


def exponent(sizes: Sequence[float], costs: Sequence[float]) -> float:
    """The slope of the least-squares line of log cost over log size."""
    return statistics.linear_regression([math.log(s) for s in sizes], [math.log(c) for c in costs]).slope


def tables(result: dict[str, Any]) -> list[Table]:
    """One row per axis and rule: cost of the smallest and the largest size, and the exponents over all sizes."""
    rows = Table(
        title="cost = c size^p: minimum seconds and peak memory of one step",
        title_justify="left",
        box=None,
        padding=(0, 2, 0, 0),
        pad_edge=False,
    )
    for column in ("rule", "size", "seconds", "p", "of cpu", "MiB", "p"):
        rows.add_column(column, justify="right" if column.startswith(("p", "of")) else "left", no_wrap=True)
    for axis, by_rule in result["axes"].items():
        for rule, found in by_rule.items():
            sizes, seconds, memory = found["sizes"], found["seconds_min"], found["memory_bytes"]
            rows.add_row(
                rule,
                f"{axis} {sizes[0]} to {sizes[-1]}",
                f"{seconds[0]:.3g} to {seconds[-1]:.3g}",
                f"{found['time_exponent']:.2f}",
                f"{found['processor_time_exponent']:.2f}",
                f"{memory[0] / 2**20:,.1f} to {memory[-1] / 2**20:,.1f}",
                f"{found['memory_exponent']:.2f}",
            )
    return [rows]


def _cases(options: Options) -> list[tuple[str, int, tuple[nn.Module, int]]]:
    """(axis, size, (model, batch size))."""
    torch.manual_seed(0)
    size = (options.size, options.size)
    model = models.build(options.model, channels=options.channels, size=size, classes=options.classes)
    batches = sorted({max(options.batch_size // share, 1) for share in SHARES})
    deep = [ResNet(BasicBlock, (n, n, n), width=16, channels=options.channels, classes=options.classes) for n in UNITS]
    return [
        *(("batch", batch_size, (model, batch_size)) for batch_size in batches),
        *(("depth", 6 * n + 2, (network, options.batch_size)) for n, network in zip(UNITS, deep, strict=True)),
    ]
