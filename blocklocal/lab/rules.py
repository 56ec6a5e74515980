"""Learning rules by name: each makes the learner of a model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from blocklocal import BLL, BLL_PAPER, BlockLocal, Predictive
from blocklocal.lab.errors import UserError
from blocklocal.losses import LocalLoss
from blocklocal.messages import Criterion


@dataclass(frozen=True)
class Task:
    """What a model is to learn, and where it may be cut: at submodules, or else into so many blocks.

    example: a batch of images as the model gets them.
    """

    classes: int
    example: Tensor
    criterion: Criterion
    blocks: int
    at: Sequence[str] | None


Rule = Callable[[nn.Module, Task], BlockLocal]


def block_local(loss: LocalLoss) -> Rule:
    """Blocks that learn from the same local loss at every border."""

    def build(model: nn.Module, task: Task) -> BlockLocal:
        return BlockLocal(
            model,
            at=task.at,
            blocks=None if task.at else task.blocks,
            classes=task.classes,
            example=task.example,
            balance="memory",  # which, unlike time, is the same at every measurement
            loss=loss,
            criterion=task.criterion,
        )

    return build


def backpropagation(model: nn.Module, task: Task) -> BlockLocal:
    """One block, no border."""
    return BlockLocal(model, blocks=1, classes=task.classes, criterion=task.criterion)


RULES: dict[str, Rule] = {
    "bll": block_local(BLL),
    "bll-paper": block_local(BLL_PAPER),
    "pred": block_local(Predictive()),
    "bp": backpropagation,
}


def find(name: str) -> Rule:
    """UserError: no such rule."""
    if name not in RULES:
        raise UserError(f"unknown rule {name!r}: choose {', '.join(RULES)}")
    return RULES[name]
