"""Copies of a block's first unit for the border before it, if that is on another rank: what is sent, and when.

A copy is one message, the bytes of the unit's weights and statistics. The rank of the border knows how many steps its
heads have made, also in a resumed run, and tells the rank of the unit at the beginning of every window.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from blocklocal.learner import BlockLocal
from blocklocal.lookahead import LookaheadHead, lookaheads
from blocklocal.pipeline.schedule import Placement
from blocklocal.pipeline.wire import started, wait


class Copies:
    """The heads that look through copies at a border between two ranks; each of the two ranks has an instance."""

    def __init__(self, heads: Sequence[LookaheadHead]) -> None:
        self.heads = heads
        self.due: dict[int, list[LookaheadHead]] = {}
        """For each minibatch of the window, the heads that refresh before it."""

    def plan(self, minibatches: int) -> None:
        """Plan a window of this number of minibatches."""
        due = {m: [head for head in self.heads if head.refreshes(m)] for m in range(minibatches)}
        self.due = {m: heads for m, heads in due.items() if heads}

    @property
    def steps(self) -> list[int]:
        return [head.steps for head in self.heads]

    def follow(self, steps: Sequence[int]) -> None:
        """Set the step counts of the heads, on the rank of the unit, where they do not run."""
        for head, count in zip(self.heads, steps, strict=True):
            head.steps = count

    def message(self, minibatch: int) -> Tensor:
        return pack(self.due[minibatch])

    def buffer(self, minibatch: int) -> Tensor:
        """An empty buffer for that message, on the rank of the border."""
        return buffer(self.due[minibatch])

    def deliver(self, minibatch: int, message: Tensor) -> None:
        for head, tensors in unpack(message, self.due[minibatch]):
            head.deliver(tensors)


def pack(heads: Sequence[LookaheadHead]) -> Tensor:
    """The bytes of the heads' units as they are now."""
    return torch.cat([tensor.detach().reshape(-1).view(torch.uint8) for head in heads for tensor in head.source()])


def buffer(heads: Sequence[LookaheadHead]) -> Tensor:
    own = [tensor for head in heads for tensor in head.own()]
    return torch.empty(sum(tensor.nbytes for tensor in own), dtype=torch.uint8, device=own[0].device)


def unpack(message: Tensor, heads: Sequence[LookaheadHead]) -> list[tuple[LookaheadHead, list[Tensor]]]:
    """Each head with the tensors that it copies."""
    found, begin = [], 0
    for head in heads:
        tensors = []
        for own in head.own():
            part = message[begin : (begin := begin + own.nbytes)].clone()  # aligned for every dtype
            tensors.append(part.view(own.dtype).view(own.shape))
        found.append((head, tensors))
    return found


def between_ranks(learner: BlockLocal, placement: Placement, *, rank: int) -> dict[int, Copies]:
    """By border, the copies that this rank gets from the next one and sends to the one before.

    Every head of the learner is told whether the next block is elsewhere.
    """
    found = {}
    for k, border in enumerate(learner.borders):
        heads = lookaheads(border)
        for head in heads:
            head.elsewhere = placement.sends(k)
        if heads and placement.sends(k) and rank in placement.ranks[k : k + 2]:
            found[k] = Copies(heads)
    return found


def begin_copies(
    learner: BlockLocal,
    copies: Mapping[int, Copies],
    *,
    blocks: Sequence[int],
    rank: int,
    group: dist.ProcessGroup | None,
    device: torch.device,
    timeout: float,
) -> None:
    """Give copies that were built on the meta device the initial weights of their units, from whichever rank has them.

    In one process a copy is taken when the learner is built; on the meta device there were no weights to copy.
    """
    leaving = []
    for k in blocks:
        before = lookaheads(learner.borders[k - 1]) if k > 0 else []
        if before and k - 1 not in copies:
            for head in before:
                head.begin(head.source())
        elif before:
            message = pack(before)
            leaving.append((started(dist.isend(message, group=group, group_dst=rank - 1)), message))
    seconds = timedelta(seconds=timeout)
    if blocks[-1] in copies:
        heads = copies[blocks[-1]].heads
        message = buffer(heads)
        work = started(dist.irecv(message, group=group, group_src=rank + 1))
        wait(work, failure=f"rank {rank}: no copy from rank {rank + 1}", timeout=seconds, device=device)
        for head, tensors in unpack(message, heads):
            head.begin(tensors)
    for work, _ in leaving:
        failure = f"rank {rank}: rank {rank - 1} did not take the copy"
        wait(work, failure=failure, timeout=seconds, device=device)
