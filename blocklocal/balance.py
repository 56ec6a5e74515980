"""Where to put K - 1 borders: the costs of a chain's segments on one batch, and their exact partition."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from blocklocal.arguments import passes
from blocklocal.layout import Layout, Reading, find_layouts
from blocklocal.memory import MemoryTracker

BorderLoss = Callable[[Tensor, Tensor, Layout | None], Callable[[Tensor], Tensor]]
"""Makes the local loss, h -> scalar, of a border after a segment from the segment's output h, the chain's prediction
and the layout found at h."""


@dataclass(frozen=True)
class Cost:
    """Cost of the forward and backward pass of one segment, or of the local loss at a border after it.

    seconds: the shortest repetition. peak: the most bytes alive during the two passes, including the gradients of the
    input and of parameters. kept: bytes that the forward pass keeps for the backward pass, including its output.
    output: bytes of the output. gradients: bytes of the gradients of parameters, which stay until the optimizer's step.
    A border that cannot be placed costs infinitely much.
    """

    seconds: float
    peak: float
    kept: int = 0
    output: int = 0
    gradients: int = 0


FREE = Cost(seconds=0.0, peak=0)
IMPOSSIBLE = Cost(seconds=math.inf, peak=math.inf)


@dataclass(frozen=True)
class Profile:
    """The costs of a chain's segments, and of a border after each of them; the last segment has none."""

    segments: tuple[Cost, ...]
    borders: tuple[Cost, ...]

    def time(self, first: int, last: int) -> float:
        """Seconds for the block of segments first..last (inclusive), with its border."""
        return sum(cost.seconds for cost in self.segments[first : last + 1]) + self.borders[last].seconds

    def memory(self, first: int, last: int) -> float:
        """Most bytes alive in the two passes of the block of segments first..last (inclusive), with its border.

        When a segment is at its own peak, the block's input, what the segments before it keep, the block's output, and
        the gradients of the parameters after it are alive too.
        """
        alive, peaks = self.segments[first - 1].output if first else 0, []
        gradients = self.borders[last].gradients + sum(cost.gradients for cost in self.segments[first : last + 1])
        for k, cost in enumerate(self.segments[first : last + 1], start=first):
            gradients -= cost.gradients
            peaks.append(alive + cost.peak + gradients + (self.segments[last].output if k < last else 0))
            alive += cost.kept
        return max(alive + self.borders[last].peak, *peaks)


def measure(
    segments: Sequence[nn.Module],
    example: Tensor,
    *,
    sides: Sequence[Sequence[Tensor]] | None = None,
    border: BorderLoss | None = None,
    repetitions: int = 3,
) -> Profile:
    """Profile copies of a chain's segments on `example`; parameters, statistics and the random state do not change.

    sides: what each segment takes after its input. border: makes the local loss at a border; it raises ValueError where
    no border can be placed. Without it borders are free.
    """
    sides = [()] * len(segments) if sides is None else sides
    calls = [_on(copy.deepcopy(segment), side) for segment, side in zip(segments, sides, strict=True)]
    devices = [example.device] if example.is_cuda else []
    with torch.random.fork_rng(devices=devices):
        with passes(example, name="example", through="the model"):
            outputs, layouts = _outputs(calls, example)
        costs = [_cost(call, h, repetitions) for call, h in zip(calls, [example, *outputs], strict=False)]
        kinds: list[tuple[torch.Size, Layout | None]] = [
            (h.shape, layout) for h, layout in zip(outputs, layouts, strict=False)
        ]
        borders: dict[tuple[torch.Size, Layout | None], Cost] = {}
        for h, kind in zip(outputs, kinds, strict=False):
            if kind not in borders:
                borders[kind] = border_cost(border, h, prediction=outputs[-1], layout=kind[1], repetitions=repetitions)
    return Profile(tuple(costs), (*(borders[kind] for kind in kinds), FREE))


def _on(segment: nn.Module, side: Sequence[Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda h: segment(h, *side)


@torch.no_grad()
def _outputs(calls: Sequence[Callable[[Tensor], Tensor]], h: Tensor) -> tuple[list[Tensor], list[Layout | None]]:
    outputs, readings = [], []
    for call in calls:
        h = h.clone()  # a segment may write into its input
        with Reading(h) as reading:
            h = call(h)
        outputs.append(h)
        readings.append(reading)
    return outputs, find_layouts(outputs, readings)


def border_cost(
    border: BorderLoss | None, h: Tensor, *, prediction: Tensor, layout: Layout | None, repetitions: int
) -> Cost:
    """The cost of a border at h; IMPOSSIBLE where none can stand."""
    if border is None:
        return FREE
    try:
        loss = border(h, prediction, layout)
    except ValueError:
        return IMPOSSIBLE
    return _cost(loss, h, repetitions)


def _cost(function: Callable[[Tensor], Tensor], h: Tensor, repetitions: int) -> Cost:
    given = _input(h)
    with MemoryTracker() as tracker:
        output = function(given)
        kept, size = tracker.alive, output.nbytes
        if output.requires_grad:
            total = (1.0 * output).sum()  # so that the incoming gradient takes memory, and is freed once read
            total.backward()  # for the first time, so that the gradients of parameters take memory
            del total
        del output, given
    seconds = min(_seconds(function, h) for _ in range(repetitions))
    return Cost(seconds, peak=tracker.timeline.peak, kept=kept, output=size, gradients=tracker.alive)


def _seconds(function: Callable[[Tensor], Tensor], h: Tensor) -> float:
    h = _input(h)
    _synchronize(h)
    start = time.perf_counter()
    output = function(h)
    if output.requires_grad:
        torch.autograd.backward(output, torch.ones_like(output))
    _synchronize(h)
    return time.perf_counter() - start


def _input(h: Tensor) -> Tensor:
    """A copy, since a segment may write into its input; it requires grad, as the input inside a block does."""
    return h.detach().requires_grad_(h.is_floating_point()).clone()


def _synchronize(tensor: Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)


def starts(profile: Profile, *, blocks: int, balance: str) -> list[int]:
    """The first segments of all blocks but block 0 that make the blocks even in "memory" or in "time"."""
    cost = profile.memory if balance == "memory" else profile.time
    return partition([cost] * blocks, segments=len(profile.segments))


def partition(costs: Sequence[Callable[[int, int], float]], *, segments: int) -> list[int]:
    """Find the first segments of all blocks but block 0, such that the most expensive block is as cheap as possible.

    costs: for each block, cost(first, last) of a block of segments first..last. Among the optima, one with a small sum
    of squares is chosen, so that the other blocks are balanced too. Exact, by dynamic programming.
    """
    tables = {
        cost: [[cost(i, j) if i <= j else 0.0 for j in range(segments)] for i in range(segments)]
        for cost in dict.fromkeys(costs)
    }
    best = [(cost, cost**2) for cost in tables[costs[0]][0]]
    choices: list[list[int]] = []
    for block in range(1, len(costs)):
        table = tables[costs[block]]
        ranked = [
            min(((max(best[i - 1][0], table[i][j]), best[i - 1][1] + table[i][j] ** 2), i) for i in range(block, j + 1))
            if j >= block
            else ((math.inf, math.inf), 0)
            for j in range(segments)
        ]
        best = [value for value, _ in ranked]
        choices.append([start for _, start in ranked])
    starts, end = [], segments - 1
    for choice in reversed(choices):
        starts.append(choice[end])
        end = choice[end] - 1
    return starts[::-1]
