"""A placement by measurement: consecutive blocks on each rank, with as little work as possible on the busiest rank."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from statistics import mean
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from blocklocal.arguments import require, require_dense, require_device, require_list, require_number
from blocklocal.balance import partition
from blocklocal.learner import BlockLocal
from blocklocal.lookahead import lookaheads
from blocklocal.pipeline.replicas import dimensions
from blocklocal.pipeline.schedule import Placement
from blocklocal.values import Inputs, map_tensors, tensors

LEAST = 0.1  # seconds for which a block is measured


def balanced(
    learner: BlockLocal,
    x: Inputs,
    y: Tensor,
    *,
    mesh: DeviceMesh | None = None,
    device: torch.device | str = "cpu",
) -> Placement:
    """The placement on the ranks of one pipeline that balances the time of their blocks for a minibatch.

    Every process must call it. All measure all blocks at the same time, on a copy of the learner and on their own
    device, so that a slow device gets less to do. mesh: as for `Pipeline`; if a rank has replicas, the slowest counts.

    >>> learner = BlockLocal([nn.Linear(8, 16), nn.Linear(16, 3)], classes=3, example=torch.randn(2, 8))
    >>> balanced(learner, torch.randn(4, 8), torch.tensor([0, 2, 1, 0])).ranks  # in a single process
    (0, 0)
    """
    group, _ = dimensions(mesh)
    require(learner, BlockLocal, name="learner", needed="pass a bll.BlockLocal")
    learner.side_inputs.check(x)
    for tensor in tensors(x):
        require_dense(tensor, name="x")
    learner.targets.check(y)
    device = require_device(device, name="device")
    seconds = torch.zeros(dist.get_world_size(group), len(learner.blocks), dtype=torch.float64)
    seconds[dist.get_rank(group)] = torch.tensor(block_seconds(learner, x, y, device=device))
    dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
    return spread(seconds.tolist())


def spread(seconds: Sequence[Sequence[float]]) -> Placement:
    """The placement that balances blocks with these seconds, given rank by rank.

    >>> spread([[1.0, 1.0, 2.0], [1.0, 1.0, 2.0]]).ranks
    (0, 0, 1)
    >>> spread([[1.0, 1.0, 2.0], [0.5, 0.5, 1.0]]).ranks
    (0, 1, 1)
    """
    needed = "pass a list for each rank, with the seconds of every block"
    require_list(seconds, name="seconds", needed=needed)
    for rank, row in enumerate(seconds):
        require_list(row, name=f"seconds[{rank}]", needed=needed)
        for k, value in enumerate(row):
            require_number(value, name=f"seconds[{rank}][{k}]", least=0)
    ranks, blocks = len(seconds), {len(row) for row in seconds}
    if len(blocks) != 1:
        raise ValueError(f"seconds has rows of {sorted(blocks)} blocks: {needed}")
    (blocks,) = blocks
    if ranks > blocks:
        raise ValueError(f"{ranks} ranks for {blocks} blocks: every rank needs a block")
    starts = partition([_total(row) for row in seconds], segments=blocks)
    return Placement(tuple(sum(k >= start for start in starts) for k in range(blocks)))


def _total(seconds: Sequence[float]) -> Callable[[int, int], float]:
    return lambda first, last: sum(seconds[first : last + 1])


def block_seconds(learner: BlockLocal, x: Inputs, y: Tensor, *, device: torch.device) -> list[float]:
    """Seconds of each block's forward and local backward pass on a device, which holds one block at a time.

    The mean is taken over long enough to show whether the device has other work to do.
    """
    learner, seconds, y = copy.deepcopy(learner).train(), [], y.to(device)
    x = map_tensors(lambda tensor: tensor.to(device), x)
    h: Any = x
    learner.share_feedback(False)  # the number of passes differs between processes
    for head in lookaheads(learner):
        head.elsewhere = False  # no pipeline sends copies here
    for k in range(len(learner.blocks)):
        parts = [learner.blocks[k], *learner.borders[k : k + 1]]
        for part in parts:
            part.to(device)
        times, output = [], h
        while len(times) < 2 or sum(times[1:]) < LEAST:
            start = time.perf_counter()
            loss, output = learner.local(k, h, y, x=x)
            loss.backward()
            if loss.is_cuda:
                torch.cuda.synchronize(loss.device)
            times.append(time.perf_counter() - start)
        seconds.append(mean(times[1:]))  # the first time is longer
        h = output
        for part in parts:
            part.to("cpu")
    return seconds
