"""What the simulator of schedules needs to know: measured in one process, or on those of a group as all compute."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import median

import torch
import torch.distributed as dist
from torch import Tensor, nn

from blocklocal.lab.pipeline_contenders import optimizer
from blocklocal.lab.pipeline_models import Chain
from blocklocal.pipeline import Placement
from blocklocal.pipeline.programs import Cost
from blocklocal.pipeline.simulator import Link
from blocklocal.pipeline.trace import Record

SIZES = (2**10, 2**23)  # bytes of the messages that measure a link


def link(*, repetitions: int = 10) -> Link:
    """From rank 0 to rank 1, receives posted first. Every rank calls it and gets the same."""
    small, large = (median(_send(size) for _ in range(repetitions)) for size in SIZES)
    bandwidth = (SIZES[1] - SIZES[0]) / max(large - small, 1e-9)
    measured = torch.tensor([small, bandwidth], dtype=torch.float64)
    dist.broadcast(measured, src=1)
    return Link(*measured.tolist())


def block_costs(records: Sequence[Record], *, blocks: int, messages: Sequence[float]) -> list[Cost]:
    """Of every block, from this rank's records of a run; messages: bytes of the blocks' outputs."""
    medians = torch.zeros(blocks, 2, dtype=torch.float64)
    for k in {record.block for record in records}:
        for i, doing in enumerate(("forward", "backward")):
            medians[k, i] = median(r.seconds for r in records if r.block == k and r.doing == doing)
    dist.all_reduce(medians)
    return [Cost(f, b, message=size) for (f, b), size in zip(medians.tolist(), messages, strict=True)]


def stage_costs(chain: Chain, *, microbatches: int, repetitions: int = 8) -> list[Cost]:
    """Of every stage of an end-to-end pipeline, the seconds of all its microbatches; every rank times its own."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    mine = Placement.even(len(chain.blocks), ranks=ranks).blocks(rank)
    h = chain.x.chunk(microbatches)[0]
    with torch.no_grad():
        for block in chain.blocks[: mine[0]]:
            h = block(h)
    h.requires_grad_(rank > 0)
    stage = nn.Sequential(*(chain.blocks[k] for k in mine))
    own = cost(stage, list(stage.parameters()), h, parts=microbatches, repetitions=repetitions, begin=dist.barrier)
    costs = torch.zeros(ranks, 4, dtype=torch.float64)
    costs[rank] = torch.tensor([own.forward, own.backward, own.update, own.message])
    dist.all_reduce(costs)
    return [Cost(f, b, update=u, message=size) for f, b, u, size in costs.tolist()]


def cost(
    forward: Callable[[Tensor], Tensor],
    parameters: list[nn.Parameter],
    h: Tensor,
    *,
    parts: int = 1,
    repetitions: int = 8,
    begin: Callable[[], object] = lambda: None,
) -> Cost:
    """Of a minibatch in so many parts, each like h: both passes of all parts, and one optimizer step.

    Medians over repetitions, each after a call of `begin`. An h that requires a gradient gets it.
    """
    stepper, seconds, size = optimizer(parameters), [], 0
    for _ in range(repetitions):
        given = h.clone()  # what is timed may write into it
        begin()
        forward_seconds, output = _timed(lambda given=given: forward(given))
        backward_seconds, _ = _timed(lambda output=output: output.backward(torch.ones_like(output)))
        update_seconds, _ = _timed(stepper.step)
        seconds.append((parts * forward_seconds, parts * backward_seconds, update_seconds))
        size = parts * output.nbytes
        if parts == 1:  # else most parts add to the gradients that are there
            stepper.zero_grad()
    f, b, u = (median(column) for column in zip(*seconds, strict=True))
    return Cost(f, b, update=u, message=size, weights=sum(parameter.nbytes for parameter in parameters))


def outputs(chain: Chain) -> list[float]:
    """Bytes of every block's output."""
    sizes, h = [], chain.x
    with torch.no_grad():
        for block in chain.blocks:
            h = block(h)
            sizes.append(float(h.nbytes))
    return sizes


def _send(size: int) -> float:
    """Seconds that a message of so many bytes is under way to rank 1; measured there."""
    rank, buffer, ready = dist.get_rank(), torch.zeros(size, dtype=torch.uint8), torch.zeros(1)
    if rank == 0:
        dist.recv(ready, src=1)
        dist.send(buffer, dst=1)
    elif rank == 1:
        message = dist.irecv(buffer, src=0)
        assert message is not None
        start = time.perf_counter()
        dist.send(ready, dst=0)
        message.wait()
        return time.perf_counter() - start
    return 0.0


def _timed(work: Callable[[], Tensor | None]) -> tuple[float, Tensor]:
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result if result is not None else torch.empty(0)
