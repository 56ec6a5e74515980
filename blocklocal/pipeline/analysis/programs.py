"""Programs of block-local pipelines, GPipe, 1F1B and data parallelism for the simulator, and how long each takes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from blocklocal.pipeline.analysis.simulator import Compute, Link, Message, Post, Program, Step, Wait, simulate
from blocklocal.pipeline.schedule import Action, Placement, schedule


@dataclass(frozen=True)
class Cost:
    """Cost of one block and minibatch: seconds of the passes and the optimizer step, bytes of output and weights.

    fixed: the part of a pass that a smaller batch does not shorten. copy: bytes of the block's first unit.
    """

    forward: float
    backward: float
    update: float = 0.0
    fixed: float = 0.0
    message: float = 0.0
    weights: float = 0.0
    copy: float = 0.0

    def split(self, parts: int) -> Cost:
        """The cost of one of `parts` microbatches."""
        forward, backward = (self.fixed + (s - self.fixed) / parts for s in (self.forward, self.backward))
        return Cost(forward, backward, self.update, self.fixed, self.message / parts, self.weights)


def block_local(
    costs: Sequence[Cost],
    *,
    link: Link,
    placement: Placement | None = None,
    window: int = 8,
    prefetch: int = 2,
    refresh: int | None = None,
) -> float:
    """Seconds per minibatch of a block-local pipeline, by default with one block per rank.

    refresh: number of minibatches after which each border takes a copy of the next block's first unit again.
    """
    placed = placement or Placement(tuple(range(len(costs))))

    def program(rank: int, minibatches: int) -> Program:
        steps: list[Step] = []
        for first in range(0, minibatches, window):
            size = min(window, minibatches - first)
            due = [m for m in range(size) if refresh and (first + m) % refresh == 0]
            copies = dict.fromkeys(range(len(costs) - 1), due)
            actions = schedule(placed, minibatches=size, prefetch=prefetch, copies=copies)[rank]
            steps += block_local_window(actions, costs, placed, first=first)
        return steps

    return _pace(lambda n: [program(rank, n) for rank in range(placed.size)], link, minibatches=4 * window)


def block_local_window(
    actions: Sequence[Action], costs: Sequence[Cost], placement: Placement, *, first: int
) -> Iterator[Step]:
    """The steps of a rank in a window of minibatches, from its actions."""
    coming: list[Message] = []

    def copy(k: int, m: int) -> Message:
        return Message(placement.ranks[k], placement.ranks[k - 1], costs[k].copy, ("copy", k, first + m))

    def message(k: int, m: int) -> Message:
        return Message(placement.ranks[k], placement.ranks[k + 1], costs[k].message, (k, first + m))

    for k, kind, m in actions:
        if kind == "RECV_F":
            yield Post(message(k - 1, m))
        elif kind == "SEND_F":
            yield Post(message(k, m))
        elif kind == "SEND_C":
            yield Post(copy(k, m))
        elif kind == "RECV_C":
            coming.append(copy(k + 1, m))
            yield Post(coming[-1])
        elif kind == "F":
            if placement.receives(k):
                yield Wait(message(k - 1, m))
            if coming and placement.sends(k):
                yield Wait(coming.pop())
            yield Compute(costs[k].forward)
        else:
            yield Compute(costs[k].backward + costs[k].update)
    yield from (Wait(message(k, m)) for k, kind, m in actions if kind == "SEND_F")
    yield from (Wait(copy(k, m)) for k, kind, m in actions if kind == "SEND_C")


def gpipe(costs: Sequence[Cost], *, microbatches: int, link: Link) -> float:
    """Seconds per minibatch of GPipe as in torch, one stage per rank: all forward passes, then all backward passes."""
    return _end_to_end(costs, microbatches, link, _gpipe)


def one_forward_one_backward(costs: Sequence[Cost], *, microbatches: int, link: Link) -> float:
    """Seconds per minibatch of 1F1B as in torch, one stage per rank: a receive is posted when it is needed."""
    return _end_to_end(costs, microbatches, link, _one_forward_one_backward)


def data_parallel(costs: Sequence[Cost], *, workers: int, link: Link, bucket: float = 25 * 2**20) -> float:
    """Seconds per minibatch of `workers` replicas of the whole model, each with its share of the minibatch.

    Gradients are summed in buckets of `bucket` bytes by ring all-reduce, as in torch's DDP: during the backward pass,
    except for the last bucket, which is full only when that is done.
    """
    parts = [cost.split(workers) for cost in costs]
    weights = sum(cost.weights for cost in costs)

    def ring(size: float) -> float:
        return 2 * (workers - 1) * link.seconds(size / workers)

    last = min(weights, bucket)
    backward = max(sum(part.backward for part in parts), ring(weights - last)) + ring(last)
    return sum(part.forward + part.update for part in parts) + backward


def _pace(programs: Callable[[int], list[Program]], link: Link, *, minibatches: int) -> float:
    """Seconds per minibatch once the pipeline is full: over the second half of `minibatches`."""
    half = minibatches // 2
    whole, first = (max(simulate(programs(n), link=link)) for n in (2 * half, half))
    return (whole - first) / half


@dataclass(frozen=True)
class _Stage:
    """A stage of an end-to-end pipeline in one minibatch: its share of the work, and its messages, none at the ends."""

    parts: Sequence[Cost]
    index: int
    minibatch: int

    @property
    def cost(self) -> Cost:
        return self.parts[self.index]

    @property
    def behind(self) -> int:
        """The number of stages from this one on."""
        return len(self.parts) - self.index

    def activation_in(self, m: int) -> list[Message]:
        return self._message("F", self.index - 1, self.index, m)

    def activation_out(self, m: int) -> list[Message]:
        return self._message("F", self.index, self.index + 1, m)

    def gradient_in(self, m: int) -> list[Message]:
        return self._message("B", self.index + 1, self.index, m)

    def gradient_out(self, m: int) -> list[Message]:
        return self._message("B", self.index, self.index - 1, m)

    def _message(self, kind: str, source: int, destination: int, m: int) -> list[Message]:
        if not 0 <= min(source, destination) <= max(source, destination) < len(self.parts):
            return []
        size = self.parts[min(source, destination)].message
        return [Message(source, destination, size, (kind, self.minibatch, m))]


def _end_to_end(
    costs: Sequence[Cost], microbatches: int, link: Link, order: Callable[[_Stage, int], Iterator[Step]]
) -> float:
    parts = [cost.split(microbatches) for cost in costs]

    def programs(minibatches: int) -> list[Program]:
        return [
            [step for i in range(minibatches) for step in order(_Stage(parts, k, i), microbatches)]
            for k in range(len(parts))
        ]

    return _pace(programs, link, minibatches=6)


def _gpipe(stage: _Stage, microbatches: int) -> Iterator[Step]:
    for m in range(microbatches):
        yield from _exchange(stage.activation_in(m))
        yield Compute(stage.cost.forward)
        yield from map(Post, stage.activation_out(m))
    for m in range(microbatches):
        yield from map(Wait, stage.activation_out(m))
    for m in range(microbatches):
        yield from _exchange(stage.gradient_in(m))
        yield Compute(stage.cost.backward)
        yield from map(Post, stage.gradient_out(m))
    for m in range(microbatches):
        yield from map(Wait, stage.gradient_out(m))
    yield Compute(stage.cost.update)


def _one_forward_one_backward(stage: _Stage, microbatches: int) -> Iterator[Step]:
    warm = min(microbatches, stage.behind)
    for m in range(warm):
        yield from _exchange(stage.activation_in(m))
        yield Compute(stage.cost.forward)
        yield from map(Wait, stage.activation_out(m - 1) if m else [])
        yield from map(Post, stage.activation_out(m) if m < warm - 1 else [])
    for m in range(microbatches):
        ahead = m + warm - 1  # the last forward pass that is done
        yield from _exchange((stage.activation_out(ahead) if ahead < microbatches else []) + stage.gradient_in(m))
        yield Compute(stage.cost.backward)
        if ahead + 1 < microbatches:
            yield from _exchange(stage.gradient_out(m) + stage.activation_in(ahead + 1))
            yield Compute(stage.cost.forward)
        else:
            yield from map(Wait, stage.gradient_out(m - 1) if ahead >= microbatches else [])
            yield from map(Post, stage.gradient_out(m))
    yield from map(Wait, stage.gradient_out(microbatches - 1))
    yield Compute(stage.cost.update)


def _exchange(messages: Sequence[Message]) -> Iterator[Step]:
    yield from map(Post, messages)
    yield from map(Wait, messages)
