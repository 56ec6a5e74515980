"""Ways to train one chain on the processes of a group. Each goes on for ever, and says when minibatches are done."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import repeat

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe
from torch.nn.functional import cross_entropy
from torch.optim import SGD

from blocklocal import BlockLocal
from blocklocal.lab.pipeline_models import CLASSES, Chain
from blocklocal.losses import LocalLoss
from blocklocal.pipeline import Pipeline, Placement

Progress = Iterator[int]
"""How many minibatches were done since the last time, again and again."""


def optimizer(parameters: list[nn.Parameter]) -> SGD:
    return SGD([{"params": parameters}], lr=0.01, momentum=0.9, fused=True)  # in a group, which may be empty


def learner(chain: Chain, loss: LocalLoss) -> BlockLocal:
    return BlockLocal(chain.blocks, classes=CLASSES, example=chain.x[:8], loss=loss)


def backpropagation(chain: Chain) -> Progress:
    """The whole chain in one process."""
    model = nn.Sequential(*chain.blocks)
    stepper = optimizer(list(model.parameters()))
    while True:
        cross_entropy(model(chain.x), chain.y).backward()
        stepper.step()
        stepper.zero_grad()
        yield 1


def blocks_alone(chain: Chain, loss: LocalLoss) -> Progress:
    """Block after block in one process."""
    whole = learner(chain, loss)
    optimizers = [optimizer(whole.block_parameters(k)) for k in range(len(chain.blocks))]
    while True:
        whole.backward(chain.x, chain.y, optimizers=optimizers)
        yield 1


def blocks_in_a_pipeline(pipeline: Pipeline, chain: Chain) -> Progress:
    """Block-local over all processes, from an empty pipeline."""
    return map(len, pipeline.train(repeat((chain.x, chain.y))))


def end_to_end(chain: Chain, schedule: type[ScheduleGPipe | Schedule1F1B], *, microbatches: int) -> Progress:
    """Backpropagation over all processes, by a schedule of torch; the stages are those of the block-local pipeline."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    blocks = Placement.even(len(chain.blocks), ranks=ranks).blocks(rank)
    module = nn.Sequential(*(chain.blocks[k] for k in blocks))
    stepper = optimizer(list(module.parameters()))
    stage = PipelineStage(module, rank, ranks, torch.device("cpu"))
    runner = schedule(stage, microbatches, loss_fn=cross_entropy)
    inputs, target = [chain.x] if rank == 0 else [], chain.y if rank == ranks - 1 else None
    while True:
        runner.step(*inputs, target=target)
        stepper.step()
        stepper.zero_grad()
        yield 1
