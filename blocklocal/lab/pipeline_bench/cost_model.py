"""Measures the inputs of the simulator, in one process or in a group while all processes compute."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import mean, median

import torch
import torch.distributed as dist
from torch import Tensor, nn

from blocklocal.lab.pipeline_bench.baselines import Replicas, optimizer
from blocklocal.lab.pipeline_bench.workloads import Chain
from blocklocal.pipeline.analysis.programs import Cost
from blocklocal.pipeline.analysis.simulator import Link
from blocklocal.pipeline.trace import Record

SIZES = (2**10, 2**23)  # bytes of the messages for measuring a link


def link(*, repetitions: int = 20) -> Link:
    """The link between ranks 0 and 1, measured with expected messages. Every rank calls it and gets the same."""
    rank, measured = dist.get_rank(), torch.zeros(2, 2, dtype=torch.float64)
    for i, size in enumerate(SIZES):
        seconds = min(_send(size) for _ in range(repetitions))  # the link's, without what delays the processes
        if rank < 2:
            measured[rank, i] = seconds
    dist.all_reduce(measured)
    (_, sent), (small, large) = measured.tolist()
    bandwidth = (SIZES[1] - SIZES[0]) / max(large - small, 1e-9)
    return Link(latency=small / 2, bandwidth=bandwidth, buffer=max(0.0, SIZES[1] - sent * bandwidth))


def block_costs(rounds: Sequence[Sequence[Record]], *, blocks: int, messages: Sequence[float]) -> list[Cost]:
    """The cost of every block, from this rank's records of several rounds. messages: bytes of the blocks' outputs."""
    seconds = torch.zeros(blocks, 2, dtype=torch.float64)
    for k in {record.block for record in rounds[0]}:
        for i, phase in enumerate(("forward", "backward")):
            seconds[k, i] = median(
                mean(r.seconds for r in records if r.block == k and r.phase == phase) for records in rounds
            )
    dist.all_reduce(seconds)
    return [Cost(f, b, message=size) for (f, b), size in zip(seconds.tolist(), messages, strict=True)]


def stage_costs(rounds: Sequence[Sequence[Sequence[float]]], *, messages: Sequence[float]) -> list[Cost]:
    """The cost of every stage of an end-to-end pipeline, from this rank's times of several rounds.

    messages: bytes of the stages' outputs.
    """
    seconds = torch.zeros(dist.get_world_size(), 3, dtype=torch.float64)
    means = [[mean(column) for column in zip(*minibatches, strict=True)] for minibatches in rounds]
    seconds[dist.get_rank()] = torch.tensor([median(column) for column in zip(*means, strict=True)])
    dist.all_reduce(seconds)
    return [Cost(f, b, update=u, message=size) for (f, b, u), size in zip(seconds.tolist(), messages, strict=True)]


def cost(
    forward: Callable[[Tensor], Tensor], parameters: list[nn.Parameter], h: Tensor, *, parts: int = 1, repetitions: int
) -> Cost:
    """The cost of a minibatch of `parts` parts, each like h: both passes of all parts, and one optimizer step.

    Medians over repetitions. If h requires a gradient, it is computed too.
    """
    stepper, seconds, size = optimizer(parameters), [], 0
    for _ in range(repetitions):
        given = h.clone()  # what is timed may write into it
        forward_seconds, output = _timed(lambda given=given: forward(given))
        backward_seconds, _ = _timed(lambda output=output: output.backward(torch.ones_like(output)))
        update_seconds, _ = _timed(stepper.step)
        seconds.append((parts * forward_seconds, parts * backward_seconds, update_seconds))
        size = parts * output.nbytes
        if parts == 1:  # else most parts add to the gradients that are there
            stepper.zero_grad()
    f, b, u = (median(column) for column in zip(*seconds, strict=True))
    return Cost(f, b, update=u, message=size, weights=sum(parameter.nbytes for parameter in parameters))


def replica_cost(chain: Chain, *, repetitions: int = 10) -> Cost:
    """The cost of the whole chain and minibatch: that of a replica for its share, while all compute, times `workers`.

    Every rank calls it and gets the longest. backward: includes the processor time for summing the gradients, which is
    not available to the pass, but not what a slow link adds.
    """
    replica, workers = Replicas(chain), dist.get_world_size()
    dist.barrier()
    share = cost(replica.loss, replica.parameters, replica.x, repetitions=repetitions)
    summing = median(_sum(share.weights) for _ in range(repetitions))
    seconds = torch.tensor([share.forward, share.backward + summing, share.update], dtype=torch.float64)
    dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
    f, b, u = seconds.tolist()
    return replace(share, forward=workers * f, backward=workers * b, update=u)


def outputs(chain: Chain) -> list[float]:
    """The bytes of every block's output."""
    sizes, h = [], chain.x
    with torch.no_grad():
        for block in chain.blocks:
            h = block(h)
            sizes.append(float(h.nbytes))
    return sizes


def _send(size: int) -> float:
    """On rank 1 the seconds from requesting `size` bytes to their arrival, on rank 0 the seconds to send them."""
    rank, buffer, ready = dist.get_rank(), torch.zeros(size, dtype=torch.uint8), torch.zeros(1)
    if rank == 0:
        dist.recv(ready, src=1)
        return _timed(lambda: dist.send(buffer, dst=1))[0]
    if rank == 1:
        message = dist.irecv(buffer, src=0)
        assert message is not None
        start = time.perf_counter()
        dist.send(ready, dst=0)
        message.wait()
        return time.perf_counter() - start
    return 0.0


def _sum(size: float) -> float:
    """Processor seconds of this rank to sum gradients of `size` bytes, including copies into and out of a bucket."""
    gradients = torch.zeros(int(size) // 4)
    bucket, start = torch.empty_like(gradients), time.process_time()
    dist.all_reduce(torch.div(gradients, dist.get_world_size(), out=bucket))
    gradients.copy_(bucket)
    return time.process_time() - start


def _timed(work: Callable[[], Tensor | None]) -> tuple[float, Tensor]:
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result if result is not None else torch.empty(0)
