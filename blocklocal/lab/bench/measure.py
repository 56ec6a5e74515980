"""Measures steps of several baselines in turn, so that a temporary slowdown of the machine affects all of them."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

from blocklocal.lab.bench.baselines import Baseline
from blocklocal.lab.bench.step_memory import StepMemory, allocated, measure
from blocklocal.lab.environment import keep_freed_memory
from blocklocal.lab.errors import UserError

Watch = Callable[[str], None]


@dataclass(frozen=True)
class Measurement:
    """Wall-clock and processor seconds of one baseline's steps, round by round, and its memory.

    step_memory: before compilation, since compiled code does not show its operations. allocated: see there;
    after compilation. flops: operations of the matrix products and convolutions in a step. state_bytes: parameters,
    buffers and optimizer state. compile_seconds: the first compiled step minus a later one.
    """

    baseline: Baseline
    seconds: tuple[float, ...]
    processor_seconds: tuple[float, ...]
    step_memory: StepMemory
    allocated: int
    flops: int
    state_bytes: int
    compile_seconds: float | None

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def measure_all(
    baselines: Mapping[str, Baseline],
    *,
    device: torch.device,
    rounds: int,
    warmup: int,
    compiled: bool = False,
    watch: Watch = lambda _: None,
) -> dict[str, Measurement]:
    """Measure the memory of each baseline, then `rounds` rounds of one step each, after `warmup` further rounds."""
    step_memories, peaks, flops, first_seconds = {}, {}, {}, {}
    for label, baseline in baselines.items():
        watch(f"memory of {label}")
        with FlopCounterMode(display=False) as counter:
            try:
                baseline.step()  # and the optimizers make their state
            except ValueError as error:  # of a layer, such as one that needs more images than there are in a part
                raise UserError(f"{label} cannot take a step: {error}") from error
        flops[label] = counter.get_total_flops()
        step_memories[label] = measure(baseline.step, parts=baseline.parts)
        if compiled:
            watch(f"compilation of {label}")
            baseline.compile()
            first_seconds[label], _ = _take(baseline, device)
        peaks[label] = allocated(baseline.step, device=device)
    times: dict[str, list[tuple[float, float]]] = {label: [] for label in baselines}
    keep_freed_memory(largest=2**30)  # so that no baseline has page faults that another is spared
    with _collector_off():
        for turn in range(-warmup, rounds):
            watch(f"time, round {max(turn + 1, 0)} of {rounds}")
            for label in _rotated(list(baselines), turn):
                taken = _take(baselines[label], device)
                if turn >= 0:
                    times[label].append(taken)
    measurements = {}
    for label, baseline in baselines.items():
        seconds, processor = zip(*times[label], strict=True)
        compile_seconds = first_seconds[label] - statistics.median(seconds) if compiled else None
        measurements[label] = Measurement(
            baseline,
            seconds,
            processor,
            step_memories[label],
            peaks[label],
            flops[label],
            state_bytes=sum(tensor.nbytes for tensor in baseline.state()),
            compile_seconds=compile_seconds,
        )
    return measurements


def ratio(numerator: tuple[float, ...], denominator: tuple[float, ...]) -> float:
    """The median over rounds of the ratio within a round."""
    return statistics.median(a / b for a, b in zip(numerator, denominator, strict=True))


def _take(baseline: Baseline, device: torch.device) -> tuple[float, float]:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start, processor_start = time.perf_counter(), time.process_time()
    baseline.step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start, time.process_time() - processor_start


def _rotated(labels: list[str], turn: int) -> list[str]:
    """The order of each round, which begins with a different baseline, since the previous one affects the caches."""
    first = turn % len(labels)
    return labels[first:] + labels[:first]


@contextmanager
def _collector_off() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
