"""Simulates a model's blocks on several ranks, from their costs in one process.

Blocks are measured one by one, with their local losses and as stages of backpropagation. A rank of speed 1 is as fast
as this process.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from blocklocal import BlockLocal
from blocklocal.lab.pipeline_bench.cost_model import cost
from blocklocal.lab.pipeline_bench.options import SCHEDULES
from blocklocal.pipeline import Placement, spread
from blocklocal.pipeline.analysis.programs import Cost, block_local, data_parallel
from blocklocal.pipeline.analysis.simulator import Link

MICROBATCHES = (2, 4, 8)
REPETITIONS = 5


@dataclass(frozen=True)
class Costs:
    """Of every block and one minibatch. local: with its local loss, its output as it travels. end_to_end: under
    backpropagation, by number of parts of a minibatch."""

    local: list[Cost]
    end_to_end: dict[int, list[Cost]]


@dataclass(frozen=True)
class Predictions:
    """Predicted seconds per minibatch. placements, block_local: on 1, 2, ... ranks. alone: backprop in one process.
    others: other ways, on all ranks."""

    costs: Costs
    speeds: Sequence[float]
    link: Link
    placements: list[Placement]
    block_local: list[float]
    alone: float
    others: dict[str, float]

    @property
    def best(self) -> int:
        """The index of the fewest ranks that are as fast as any number of them, to a hundredth."""
        return next(i for i, seconds in enumerate(self.block_local) if seconds <= 1.01 * min(self.block_local))

    def work(self, placement: Placement) -> list[float]:
        """Seconds of each rank's own on a minibatch, with a placement of blocks."""
        return [busy(stage) for stage in stages(_slowed(self.costs.local, placement, self.speeds), placement)]


def measure(learner: BlockLocal, x: Tensor, y: Tensor, *, ranks: int, message: torch.dtype) -> Costs:
    """The costs of a copy of the learner's blocks, for the numbers of parts of pipelines on this number of ranks.

    A part has at least two images, as batch normalisation requires.
    """
    learner, h = copy.deepcopy(learner).train(), x
    local: list[Cost] = []
    end_to_end: dict[int, list[Cost]] = {m: [] for m in (1, *MICROBATCHES, ranks) if 2 * m <= len(x)}
    for k, block in enumerate(learner.blocks):
        last = k == len(learner.blocks) - 1
        with torch.no_grad():
            _, output = learner.local(k, h, y)
        parameters = learner.block_parameters(k)
        found = cost(lambda h, k=k: learner.local(k, h, y)[0], parameters, h, repetitions=REPETITIONS)
        local.append(replace(found, message=output.numel() * message.itemsize))
        for m, costs in end_to_end.items():
            part, labels = h[: len(h) // m].detach().requires_grad_(k > 0), y[: len(h) // m]
            stage = (lambda h, y=labels, block=block: learner.criterion(block(h), y)) if last else block
            found = cost(stage, list(block.parameters()), part, parts=m, repetitions=REPETITIONS)
            costs.append(replace(found, message=output.nbytes))
        h = output
    return Costs(local, end_to_end)


def predict(costs: Costs, *, speeds: Sequence[float], link: Link) -> Predictions:
    """Predict the time of every way of training, with placements that balance the time of the blocks.

    speeds: of each rank, relative to the process that measured the costs.
    """
    ranks, whole = len(speeds), costs.end_to_end[1]
    placements = [_even(costs.local, speeds[: n + 1]) for n in range(ranks)]
    placed = _even(whole, speeds)
    others = {
        f"{name}, M={m}": program(
            stages(_slowed(costs.end_to_end[m], placed, speeds), placed), microbatches=m, link=link
        )
        for name, (_, program) in SCHEDULES.items()
        for m in MICROBATCHES
        if ranks > 1 and m in costs.end_to_end and (name == "GPipe" or m >= ranks)
    }
    if ranks > 1 and ranks in costs.end_to_end:
        slowest = [_at_speed(block, min(speeds)) for block in costs.end_to_end[ranks]]
        others["data parallel"] = data_parallel(slowest, workers=ranks, link=link)
    return Predictions(
        costs,
        speeds,
        link,
        placements,
        block_local=[
            block_local(_slowed(costs.local, placement, speeds), link=link, placement=placement)
            for placement in placements
        ],
        alone=sum(map(busy, whole)),
        others=others,
    )


def _even(costs: Sequence[Cost], speeds: Sequence[float]) -> Placement:
    return spread([[busy(block) / speed for block in costs] for speed in speeds])


def _slowed(costs: Sequence[Cost], placement: Placement, speeds: Sequence[float]) -> list[Cost]:
    """The costs of the blocks on the ranks where they are placed."""
    return [_at_speed(block, speeds[rank]) for block, rank in zip(costs, placement.ranks, strict=True)]


def _at_speed(block: Cost, speed: float) -> Cost:
    return replace(
        block,
        forward=block.forward / speed,
        backward=block.backward / speed,
        update=block.update / speed,
        fixed=block.fixed / speed,
    )


def busy(block: Cost) -> float:
    """Seconds of its work on a minibatch."""
    return block.forward + block.backward + block.update


def stages(costs: Sequence[Cost], placement: Placement) -> list[Cost]:
    """The blocks of each rank as one."""
    ranks = [[costs[k] for k in placement.blocks(rank)] for rank in range(placement.size)]
    return [
        Cost(
            forward=sum(block.forward for block in blocks),
            backward=sum(block.backward for block in blocks),
            update=sum(block.update for block in blocks),
            message=blocks[-1].message,
        )
        for blocks in ranks
    ]
