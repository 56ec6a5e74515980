"""The memory of one training step, and the resident memory of the process while it runs."""

from __future__ import annotations

import gc
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import torch
from torch import nn
from torch.profiler import ProfilerActivity

from blocklocal.lab.bench.profile import profiler
from blocklocal.lab.environment import give_back_freed_memory
from blocklocal.memory import MemoryTracker, Timeline


@dataclass(frozen=True)
class StepMemory:
    """What one step adds to the memory used before it for parameters, buffers, optimizer state and the batch.

    timeline: bytes of the tensors alive, see `MemoryTracker`. marks: the second at which each part of the model
    began its forward pass. resident_peak, resident_growth: bytes of the whole process at the peak, and minus those
    before the step; None outside Linux.
    """

    timeline: Timeline
    marks: tuple[float, ...]
    resident_peak: int | None
    resident_growth: int | None

    @property
    def alive(self) -> int:
        """The most bytes of tensors alive at once: activations, what autograd saves, gradients, temporaries."""
        return self.timeline.peak


def measure(step: Callable[[], None], *, parts: Sequence[nn.Module]) -> StepMemory:
    """Measure `step`, which is run twice. Anything that only a first step does must be done before."""
    resident_peak, resident_growth = _resident(step)
    gc.collect()
    marks: list[float] = []
    with MemoryTracker() as tracker:
        hooks = [part.register_forward_pre_hook(lambda *_: marks.append(tracker.seconds)) for part in parts]
        step()
    for hook in hooks:
        hook.remove()
    return StepMemory(tracker.timeline, tuple(marks), resident_peak=resident_peak, resident_growth=resident_growth)


def allocated(step: Callable[[], None], *, device: torch.device) -> int:
    """The most bytes allocated at once during `step`, minus those before it.

    Unlike `StepMemory.alive`, this includes the workspace inside operations, and covers compiled code. On CUDA it is
    torch.cuda.max_memory_allocated; on a CPU it is computed from the allocations that the profiler records.
    """
    if device.type != "cuda":
        return max(accumulate(_allocations(step), initial=0))
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    step()
    return torch.cuda.max_memory_allocated(device) - before


def _allocations(step: Callable[[], None]) -> list[int]:
    """Bytes allocated (positive) and freed (negative) on the CPU, in order."""
    with profiler(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        step()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "trace.json")
        profiled.export_chrome_trace(str(file))
        events = json.loads(file.read_text())["traceEvents"]
    changes = [event for event in events if event["name"] == "[memory]"]
    return [event["args"]["Bytes"] for event in sorted(changes, key=lambda event: event["ts"])]


def _resident(step: Callable[[], None]) -> tuple[int | None, int | None]:
    if not sys.platform.startswith("linux"):
        step()
        return None, None
    gc.collect()
    give_back_freed_memory()  # otherwise memory freed by an earlier step still counts as resident
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
