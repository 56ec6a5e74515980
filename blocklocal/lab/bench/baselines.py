"""The kinds of training step that `bll bench` compares, each on its own copy of one model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import SGD, Optimizer

from blocklocal import recompute, split
from blocklocal.candidates import candidates
from blocklocal.lab.errors import UserError, blame, lacks_memory
from blocklocal.lab.training import rules

EXAMPLE = 8  # images for balancing the blocks


@dataclass(frozen=True)
class Workload:
    """The task of every baseline: train this model on this batch.

    head: of all predictions at borders; None: the rule's own. accumulate: parts of the batch for `bp-accumulate`.
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
        """Attribute errors to the model if it is the user's, except for a lack of memory."""
        return blame(f"model {self.name!r} {what}", unless=lacks_memory) if ":" in self.name else nullcontext()


@dataclass(frozen=True)
class Baseline:
    """A rule with its model. step: one training step, from the batch to updated weights. module: what is trained,
    including borders. parts: the modules that run one after another in a step, such as blocks."""

    rule: str
    module: nn.Module
    optimizers: Sequence[Optimizer]
    step: Callable[[], None]
    parts: Sequence[nn.Module]
    compile: Callable[[], None]

    @property
    def blocks(self) -> int:
        return len(self.parts)

    def state(self) -> Iterable[Tensor]:
        """Parameters, buffers and optimizer state."""
        yield from self.module.parameters()
        yield from self.module.buffers()
        for optimizer in self.optimizers:
            for kept in optimizer.state.values():
                yield from (value for value in kept.values() if isinstance(value, Tensor))


def baseline(rule: str, work: Workload, *, blocks: int) -> Baseline:
    """A rule, see `find`, on a copy of the model. UserError: the model does not fit the rule, or fails in a step."""
    with work.blamed(f"does not fit rule {rule!r}"):
        work = replace(work, model=copy.deepcopy(work.model))
        torch.manual_seed(0)  # borders begin with the same weights under every rule
        try:
            made = find(rule)(rule, work, blocks)
        except ValueError as error:
            raise UserError(f"rule {rule!r}: {error}") from error

    def step() -> None:
        with work.blamed(f"fails in a step of {rule}"):
            made.step()

    return replace(made, step=step)


Build = Callable[[str, Workload, int], Baseline]


def backpropagation(rule: str, work: Workload, blocks: int) -> Baseline:
    return _whole(rule, work, work.model)


def checkpointing(rule: str, work: Workload, blocks: int) -> Baseline:
    return _whole(rule, work, checkpointed(work.model))


def accumulation(rule: str, work: Workload, blocks: int) -> Baseline:
    if len(work.x) % work.accumulate:
        raise UserError(f"--accumulate {work.accumulate} does not divide the batch of {len(work.x)} images")
    return _whole(rule, work, work.model, batches=work.accumulate)


def ruled(rule: str, work: Workload, blocks: int) -> Baseline:
    """A rule of `bll train`; blocks are trained one after another."""
    return _in_turn(rule, work, _learning(rule, work, work.model, blocks=blocks))


def checkpointed_blocks(rule: str, work: Workload, blocks: int) -> Baseline:
    """The default rule, with checkpointing inside blocks."""
    return _in_turn(rule, work, _learning("bll", work, checkpointed(work.model), blocks=blocks))


def summed(rule: str, work: Workload, blocks: int) -> Baseline:
    """One backward pass of the sum of the local losses: the same gradients, but all graphs are alive at once."""
    learner = _learning("bll", work, work.model, blocks=blocks).learner
    optimizer = _sgd(learner.parameters())

    def step() -> None:
        with work.autocast():
            loss = torch.stack(learner(work.x, work.y)).sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return Baseline(rule, learner, [optimizer], step, list(learner.blocks), learner.compile)


WHOLE: dict[str, Build] = {"bp": backpropagation, "bp-checkpoint": checkpointing, "bp-accumulate": accumulation}
IN_BLOCKS: dict[str, Build] = {"bll-checkpoint": checkpointed_blocks, "bll-sum": summed}
SPECIAL = WHOLE | IN_BLOCKS  # to this benchmark


def find(rule: str) -> Build:
    """A rule of this benchmark or of `bll train`. UserError: neither."""
    if rule not in SPECIAL and rule not in rules.RULES and not rules.is_own(rule):
        raise UserError(f"unknown rule {rule!r}: choose {', '.join(dict.fromkeys([*rules.RULES, *SPECIAL]))}")
    return SPECIAL.get(rule, ruled)


def in_blocks(rule: str) -> bool:
    """Whether the rule depends on the number of blocks."""
    return rule in IN_BLOCKS or (rule not in WHOLE and rules.find(rule).in_blocks)


def _whole(rule: str, work: Workload, model: nn.Module, *, batches: int = 1) -> Baseline:
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

    return Baseline(rule, model, [optimizer], step, [model], compile)


def _learning(rule: str, work: Workload, model: nn.Module, *, blocks: int) -> rules.Learning:
    problem = rules.Problem(
        classes=work.classes,
        example=work.x[:EXAMPLE],
        blocks=blocks,
        balance=work.balance,
        changes=rules.Changes(head=work.head if in_blocks(rule) else None),
    )
    learning = rules.apply(rule, model, problem)
    if work.x.is_contiguous(memory_format=torch.channels_last):
        learning.learner.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return learning


def _in_turn(rule: str, work: Workload, learning: rules.Learning) -> Baseline:
    learner = learning.learner
    optimizers = [_sgd(learner.block_parameters(k)) for k in range(len(learner.blocks))]

    def step() -> None:
        with work.autocast(), learning.with_targets(work.y):
            learner.backward(work.x, work.y, optimizers=optimizers)

    return Baseline(rule, learner, optimizers, step, list(learner.blocks), learner.compile)


def checkpointed(model: nn.Module) -> nn.Sequential:
    """The model as a chain of its smallest segments, such as residual units, each of which keeps only its input."""
    chain = split(model, at=candidates(model))
    for segment in chain:
        recompute(segment)
    return chain


def _sgd(parameters: Iterable[nn.Parameter]) -> SGD:
    return SGD([{"params": list(parameters)}], lr=1e-3, momentum=0.9, weight_decay=5e-4, nesterov=True)
