"""The memory of one training step, and the resident memory of the process while it runs."""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from blocklocal.memory import MemoryTracker, Timeline


@dataclass(frozen=True)
class Footprint:
    """What one step adds to the memory that is taken before it: parameters, buffers, optimizer state and the batch.

    bytes: the most that is alive at once. On CUDA the allocator's own peak (torch.cuda.max_memory_allocated, less what
    was allocated before the step); elsewhere the storages of all tensors that operations make, see `MemoryTracker`.
    timeline, marks: the course of those storages, and when each part of the model began its forward pass, in seconds.
    resident_peak, resident_growth: bytes of the whole process, at the peak and less those before; None outside Linux.
    """

    bytes: int
    timeline: Timeline
    marks: tuple[float, ...]
    resident_peak: int | None
    resident_growth: int | None


def measure(step: Callable[[], None], *, parts: Sequence[nn.Module], device: torch.device) -> Footprint:
    """The footprint of `step`, which is taken twice. What only a first step does must be done before."""
    resident_peak, resident_growth = _resident(step)
    gc.collect()
    marks: list[float] = []
    cuda = device.type == "cuda"
    before = torch.cuda.memory_allocated(device) if cuda else 0
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
    with MemoryTracker() as tracker:
        hooks = [part.register_forward_pre_hook(lambda *_: marks.append(tracker.seconds)) for part in parts]
        step()
    for hook in hooks:
        hook.remove()
    peak = torch.cuda.max_memory_allocated(device) - before if cuda else tracker.timeline.peak
    return Footprint(peak, tracker.timeline, tuple(marks), resident_peak, resident_growth)


def _resident(step: Callable[[], None]) -> tuple[int | None, int | None]:
    if not sys.platform.startswith("linux"):
        step()
        return None, None
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)  # else what an earlier step has freed still counts as resident
    Path("/proc/self/clear_refs").write_text("5")  # the peak from here on
    before = _status("VmRSS")
    step()
    peak = _status("VmHWM")
    return peak, peak - before


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {key}")
