"""A placement by measurement: consecutive blocks on each rank, such that the busiest rank has as little as can be."""

from __future__ import annotations

import copy
import time

import torch
import torch.distributed as dist
from torch import Tensor

from blocklocal.balance import partition
from blocklocal.learner import BlockLocal
from blocklocal.pipeline.schedule import Placement


def balanced(learner: BlockLocal, x: Tensor, y: Tensor, *, ranks: int) -> Placement:
    """The placement on so many ranks that evens out the blocks' times on a minibatch.

    Every process calls it; that of rank 0 measures, on a copy of the learner, and tells the others.
    """
    placed = torch.zeros(len(learner.blocks), dtype=torch.int64)
    if dist.get_rank() == 0:
        placed += torch.tensor(spread(block_seconds(learner, x, y), ranks=ranks).ranks)
    dist.broadcast(placed, src=0)
    return Placement(tuple(placed.tolist()))


def spread(seconds: list[float], *, ranks: int) -> Placement:
    """Of blocks that take so long, on so many ranks.

    >>> spread([1.0, 1.0, 2.0], ranks=2).ranks
    (0, 0, 1)
    """
    if not 1 <= ranks <= len(seconds):
        raise ValueError(f"{ranks} ranks for {len(seconds)} blocks: every rank needs a block")
    starts = partition(lambda i, j: sum(seconds[i : j + 1]), segments=len(seconds), blocks=ranks)
    return Placement(tuple(sum(k >= start for start in starts) for k in range(len(seconds))))


def block_seconds(learner: BlockLocal, x: Tensor, y: Tensor, *, repetitions: int = 3) -> list[float]:
    """Of every block, the best time of a forward and a local backward pass."""
    learner, seconds, h = copy.deepcopy(learner).train(), [], x
    for k in range(len(learner.blocks)):
        times, output = [], h
        for _ in range(repetitions):
            start = time.perf_counter()
            loss, output = learner.local(k, h, y)
            loss.backward()
            if loss.is_cuda:
                torch.cuda.synchronize(loss.device)
            times.append(time.perf_counter() - start)
        seconds.append(min(times))
        h = output
    return seconds
