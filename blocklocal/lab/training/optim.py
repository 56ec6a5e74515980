"""The optimizer of a block, and its learning rate, which depends only on the number of the minibatch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol, TypeGuard

import torch
from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from blocklocal.lab.settings import Settings


def make_optimizer(parameters: list[nn.Parameter], settings: Settings) -> Optimizer:
    """The optimizer of --optimizer for the parameters of a block, with gradients clipped to --clip if it is given."""
    optimizer = OPTIMIZERS[settings.optimizer](parameters, settings)
    if settings.clip:
        optimizer.register_step_pre_hook(partial(_clip, parameters, settings.clip))
    return optimizer


def sgd(parameters: list[nn.Parameter], settings: Settings) -> SGD:
    """Stochastic gradient descent with Nesterov momentum."""
    return SGD(
        [{"params": parameters}],  # a group may be empty, a list of parameters may not
        lr=settings.lr,
        momentum=settings.momentum,
        weight_decay=settings.weight_decay,
        nesterov=True,
    )


def adamw(parameters: list[nn.Parameter], settings: Settings) -> AdamW:
    """AdamW (Loshchilov and Hutter, 2019); vectors, such as biases and the scales of norms, do not decay."""
    betas = (settings.momentum, settings.beta2)
    return AdamW(_decaying(parameters, settings), lr=settings.lr, betas=betas)


def schedule_free(parameters: list[nn.Parameter], settings: Settings) -> Optimizer:
    """Schedule-free AdamW (Defazio et al., 2024), which averages the weights instead of lowering the rate."""
    from schedulefree import AdamWScheduleFree

    betas = (settings.momentum, settings.beta2)
    optimizer = AdamWScheduleFree(_decaying(parameters, settings), lr=settings.lr, betas=betas)
    optimizer.train()
    return optimizer


OPTIMIZERS: dict[str, Callable[[list[nn.Parameter], Settings], Optimizer]] = {
    "sgd": sgd,
    "adamw": adamw,
    "schedulefree": schedule_free,
}


class Averaging(Protocol):
    """An optimizer that shows the averages of its parameters between eval() and train()."""

    param_groups: list[dict[str, Any]]

    def eval(self) -> None: ...

    def train(self) -> None: ...


@contextmanager
def averaged(optimizers: Sequence[Optimizer | None]) -> Iterator[None]:
    """A context in which the parameters of a schedule-free optimizer are its averages, by which it is judged.

    Afterwards they are what they were to the bit, so that it does not matter when a run is tested. Of other optimizers
    nothing changes.
    """
    averaging = [one for one in optimizers if averages(one)]
    parameters = [parameter for one in averaging for group in one.param_groups for parameter in group["params"]]
    kept = [parameter.detach().clone() for parameter in parameters]
    for one in averaging:
        one.eval()
    try:
        yield
    finally:
        for one in averaging:
            one.train()
        with torch.no_grad():
            for parameter, before in zip(parameters, kept, strict=True):
                parameter.copy_(before)


def averages(optimizer: Optimizer | None) -> TypeGuard[Averaging]:
    """Whether an optimizer shows the averages of its parameters in eval(), as a schedule-free one does."""
    return hasattr(optimizer, "eval")


def _decaying(parameters: list[nn.Parameter], settings: Settings) -> list[dict[str, Any]]:
    matrices = [parameter for parameter in parameters if parameter.dim() > 1]
    vectors = [parameter for parameter in parameters if parameter.dim() <= 1]
    return [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": vectors, "weight_decay": 0.0}]


def _clip(parameters: list[nn.Parameter], norm: float, *_: object) -> None:
    nn.utils.clip_grad_norm_(parameters, norm)


Schedule = Callable[[int, int, int], float]


def cosine(step: int, warmup: int, total: int) -> float:
    """Linear rise over `warmup` steps, then half a cosine down to zero."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(total - warmup, 1)))


def onecycle(step: int, warmup: int, total: int) -> float:
    """Linear rise over the first 30 % of the steps, then linear fall to zero; `warmup` is not used."""
    peak = max(round(0.3 * total), 1)
    return (step + 1) / peak if step < peak else (total - step) / max(total - peak, 1)


def constant(step: int, warmup: int, total: int) -> float:
    """Linear rise over `warmup` steps, then constant at one."""
    return (step + 1) / warmup if step < warmup else 1.0


SCHEDULES: dict[str, Schedule] = {"cosine": cosine, "onecycle": onecycle, "constant": constant}


def set_rate(optimizer: Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate
