"""Ways to train one chain on the processes of a group. Each continues for ever, and reports finished minibatches."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import repeat
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD

from blocklocal import BlockLocal
from blocklocal.lab.pipeline_bench.workloads import CLASSES, Chain
from blocklocal.lab.training import rules
from blocklocal.pipeline import Pipeline, Placement

Progress = Iterator[int]
"""Yields the number of minibatches finished since the last time, without end."""


def optimizer(parameters: list[nn.Parameter]) -> SGD:
    return SGD([{"params": parameters}], lr=0.01, momentum=0.9, fused=True)  # in a group, which may be empty


def learner(chain: Chain, rule: str) -> BlockLocal:
    """The learner of a chain under a rule of `bll train`."""
    return rules.apply(rule, chain.blocks, rules.Problem(classes=CLASSES, example=chain.x[:8])).learner


def backpropagation(chain: Chain) -> Progress:
    """The whole chain in one process."""
    return _backpropagate(nn.Sequential(*chain.blocks), chain.x, chain.y)


def _backpropagate(model: nn.Module, x: Tensor, y: Tensor) -> Progress:
    stepper = optimizer(list(model.parameters()))
    while True:
        cross_entropy(model(x), y).backward()
        stepper.step()
        stepper.zero_grad()
        yield 1


def blocks_alone(chain: Chain, rule: str) -> Progress:
    """Block after block in one process."""
    whole = learner(chain, rule)
    whole.share_feedback(False)
    optimizers = [optimizer(whole.block_parameters(k)) for k in range(len(chain.blocks))]
    while True:
        whole.backward(chain.x, chain.y, optimizers=optimizers)
        yield 1


def blocks_in_a_pipeline(pipeline: Pipeline, chain: Chain) -> Progress:
    """Block-local over all processes, from an empty pipeline."""
    return map(len, pipeline.train(repeat((chain.x, chain.y))))


class Replicas:
    """Backpropagation of the whole chain in every process, on its share of the minibatch (DDP)."""

    def __init__(self, chain: Chain) -> None:
        self.x, self.y = (whole.tensor_split(dist.get_world_size())[dist.get_rank()] for whole in (chain.x, chain.y))
        self.model = nn.Sequential(*copy.deepcopy(chain.blocks))  # DDP stays attached to its parameters
        self.parameters = list(self.model.parameters())

    def loss(self, x: Tensor) -> Tensor:
        return cross_entropy(self.model(x), self.y)

    def __iter__(self) -> Progress:
        return _backpropagate(DistributedDataParallel(self.model), self.x, self.y)


class ClockedStage(PipelineStage):
    """A stage of this rank that records its seconds of work in every minibatch: forward, backward, optimizer step.

    What the runtime does between them counts for the passes, half and half, as far as it takes processor time.
    """

    def __init__(self, module: nn.Module, rank: int, ranks: int) -> None:
        super().__init__(module, rank, ranks, torch.device("cpu"))
        self.seconds: list[list[float]] = []
        self._processor = 0.0  # seconds of its time in what is clocked

    @contextmanager
    def minibatch(self) -> Iterator[None]:
        self.seconds.append([0.0] * 3)
        begin, self._processor = time.thread_time(), 0.0
        yield
        between = time.thread_time() - begin - self._processor
        for doing in (0, 1):
            self.seconds[-1][doing] += between / 2

    def clock(self, doing: int, work: Callable[..., Any], *args: Any, **keywords: Any) -> Any:
        """Time work of the current minibatch. doing: 0 forward, 1 backward, 2 the optimizer step."""
        start, begin = time.perf_counter(), time.thread_time()
        result = work(*args, **keywords)
        self.seconds[-1][doing] += time.perf_counter() - start
        self._processor += time.thread_time() - begin
        return result

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        return self.clock(0, cross_entropy, output, target)

    def forward_one_chunk(self, *args: Any, **keywords: Any) -> Any:
        return self.clock(0, super().forward_one_chunk, *args, **keywords)

    def backward_one_chunk(self, *args: Any, **keywords: Any) -> None:
        self.clock(1, super().backward_one_chunk, *args, **keywords)

    def perform_reduce_grad(self, grad_scale_factor: int) -> None:
        self.clock(2, super().perform_reduce_grad, grad_scale_factor)


class EndToEnd:
    """Backpropagation over all processes with a schedule of torch, with the stages of the block-local pipeline."""

    def __init__(self, chain: Chain, schedule: type[ScheduleGPipe | Schedule1F1B], *, microbatches: int) -> None:
        rank, ranks = dist.get_rank(), dist.get_world_size()
        blocks = Placement.even(len(chain.blocks), ranks=ranks).blocks(rank)
        module = nn.Sequential(*(chain.blocks[k] for k in blocks))
        self.stage = ClockedStage(module, rank, ranks)
        self._optimizer = optimizer(list(module.parameters()))
        self._runner = schedule(self.stage, microbatches, loss_fn=self.stage.loss)
        self._inputs, self._target = [chain.x] if rank == 0 else [], chain.y if rank == ranks - 1 else None

    def __iter__(self) -> Progress:
        while True:
            with self.stage.minibatch():
                self._runner.step(*self._inputs, target=self._target)
                self.stage.clock(2, self._update)
            yield 1

    def _update(self) -> None:
        self._optimizer.step()
        self._optimizer.zero_grad()
