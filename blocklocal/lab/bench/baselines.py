"""The ways of taking a training step that `bll bench` sets side by side, each on its own copy of one model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import SGD

from blocklocal import BLL, BLL_PAPER, PRED_SIM, BlockLocal, Predictive, recompute, split
from blocklocal.lab.errors import UserError, blame, lacks_memory
from blocklocal.lab.training import rules
from blocklocal.losses import LocalLoss
from blocklocal.split import candidates

EXAMPLE = 8  # images by which the blocks are balanced


@dataclass(frozen=True)
class Workload:
    """What every contender does: train this model on this batch.

    head: of all predictions at borders, None for that of the rule. accumulate: parts of the batch for `bp-accumulate`.
    name: of the model, in messages.
    """

    model: nn.Module
    x: Tensor
    y: Tensor
    classes: int
    dtype: torch.dtype
    balance: Literal["time", "memory"]
    head: str | None
    accumulate: int
    name: str = ""

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.x.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def blamed(self, what: str) -> AbstractContextManager[None]:
        """What goes wrong in a model of the user's is said of it, but for a lack of memory."""
        return blame(f"model {self.name!r} {what}", unless=lacks_memory) if ":" in self.name else nullcontext()


@dataclass(frozen=True)
class Contender:
    """A rule at work. step: one training step, from the batch to changed weights. module: what is trained, borders
    among it. parts: the modules that follow each other in a step, blocks where there are some."""

    rule: str
    module: nn.Module
    optimizers: Sequence[SGD]
    step: Callable[[], None]
    parts: Sequence[nn.Module]
    compile: Callable[[], None]

    @property
    def blocks(self) -> int:
        return len(self.parts)

    def state(self) -> Iterable[Tensor]:
        """Parameters, buffers and what the optimizers keep."""
        yield from self.module.parameters()
        yield from self.module.buffers()
        for optimizer in self.optimizers:
            for kept in optimizer.state.values():
                yield from (value for value in kept.values() if isinstance(value, Tensor))


def contender(rule: str, work: Workload, *, blocks: int) -> Contender:
    """One of `RULES` on a copy of the model. UserError: a model that the rule does not fit, or that fails in a step."""
    with work.blamed(f"does not fit rule {rule!r}"):
        work = replace(work, model=copy.deepcopy(work.model))
        torch.manual_seed(0)  # borders begin with the same weights under every rule
        try:
            made = RULES[rule](rule, work, blocks)
        except ValueError as error:
            raise UserError(f"rule {rule!r}: {error}") from error

    def step() -> None:
        with work.blamed(f"fails in a step of {rule}"):
            made.step()

    return replace(made, step=step)


Build = Callable[[str, Workload, int], Contender]


def backpropagation(rule: str, work: Workload, blocks: int) -> Contender:
    return _whole(rule, work, work.model)


def checkpointing(rule: str, work: Workload, blocks: int) -> Contender:
    return _whole(rule, work, _checkpointed(work.model))


def accumulation(rule: str, work: Workload, blocks: int) -> Contender:
    if len(work.x) % work.accumulate:
        raise UserError(f"--accumulate {work.accumulate} does not divide the batch of {len(work.x)} images")
    return _whole(rule, work, work.model, batches=work.accumulate)


def local(loss: LocalLoss, *, checkpointed: bool = False) -> Build:
    """Blocks that learn from this loss, one after the other."""

    def build(rule: str, work: Workload, blocks: int) -> Contender:
        learner = _learner(work, _checkpointed(work.model) if checkpointed else work.model, loss=loss, blocks=blocks)
        optimizers = [_sgd(learner.block_parameters(k)) for k in range(len(learner.blocks))]

        def step() -> None:
            with work.autocast():
                learner.backward(work.x, work.y, optimizers=optimizers)

        return Contender(rule, learner, optimizers, step, list(learner.blocks), learner.compile)

    return build


def summed(rule: str, work: Workload, blocks: int) -> Contender:
    """One backward pass of the sum of the local losses: the same gradients, and all graphs alive."""
    learner = _learner(work, work.model, loss=BLL, blocks=blocks)
    optimizer = _sgd(learner.parameters())

    def step() -> None:
        with work.autocast():
            loss = torch.stack(learner(work.x, work.y)).sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return Contender(rule, learner, [optimizer], step, list(learner.blocks), learner.compile)


def other(rule: str, work: Workload, blocks: int) -> Contender:
    """A rule of `bll train` without borders."""
    task = rules.Task(classes=work.classes, example=work.x[:EXAMPLE], blocks=1, at=None)
    learning = rules.apply(rule, work.model, task)
    learner, optimizer = learning.learner, _sgd(work.model.parameters())

    def step() -> None:
        with work.autocast(), learning.given(work.y):
            learner.backward(work.x, work.y, optimizers=[optimizer])

    return Contender(rule, learner, [optimizer], step, list(learner.blocks), learner.compile)


IN_BLOCKS: dict[str, Build] = {
    "bll": local(BLL),
    "bll-checkpoint": local(BLL, checkpointed=True),
    "bll-sum": summed,
    "bll-paper": local(BLL_PAPER),
    "pred": local(Predictive()),
    "predsim": local(PRED_SIM),
}
WHOLE: dict[str, Build] = {"bp": backpropagation, "bp-checkpoint": checkpointing, "bp-accumulate": accumulation}
RULES = dict.fromkeys(rules.RULES, other) | WHOLE | IN_BLOCKS


def _whole(rule: str, work: Workload, model: nn.Module, *, batches: int = 1) -> Contender:
    optimizer = _sgd(model.parameters())
    called: list[Callable[[Tensor], Tensor]] = [model]

    def step() -> None:
        for x, y in zip(work.x.chunk(batches), work.y.chunk(batches), strict=True):
            with work.autocast():
                loss = cross_entropy(called[0](x), y) / batches
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    def compile() -> None:
        called[0] = torch.compile(model)

    return Contender(rule, model, [optimizer], step, [model], compile)


def _learner(work: Workload, model: nn.Module, *, loss: LocalLoss, blocks: int) -> BlockLocal:
    learner = BlockLocal(
        model,
        blocks=blocks,
        classes=work.classes,
        example=work.x[:EXAMPLE],
        balance=work.balance,
        loss=rules.Changes(head=work.head).made(loss),
    )
    if work.x.is_contiguous(memory_format=torch.channels_last):
        learner.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return learner


def _checkpointed(model: nn.Module) -> nn.Sequential:
    """The model as a chain of its smallest segments, such as residual units, each of which keeps its input alone."""
    chain = split(model, at=candidates(model))
    for segment in chain:
        recompute(segment)
    return chain


def _sgd(parameters: Iterable[nn.Parameter]) -> SGD:
    return SGD([{"params": list(parameters)}], lr=1e-3, momentum=0.9, weight_decay=5e-4, nesterov=True)
