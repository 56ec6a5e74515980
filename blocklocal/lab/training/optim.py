"""The optimizer of a block, and its learning rate: a function of the number of the minibatch alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

from torch import nn
from torch.optim import SGD, Optimizer

from blocklocal.lab.settings import Settings


def descent(parameters: list[nn.Parameter], settings: Settings) -> SGD:
    """Stochastic gradient descent with Nesterov momentum; with --clip, of gradients that are clipped first."""
    optimizer = SGD(
        [{"params": parameters}],  # a group may be empty, a list of parameters may not
        lr=settings.lr,
        momentum=settings.momentum,
        weight_decay=settings.weight_decay,
        nesterov=True,
    )
    if settings.clip:
        optimizer.register_step_pre_hook(partial(_clip, parameters, settings.clip))
    return optimizer


def _clip(parameters: list[nn.Parameter], norm: float, *_: object) -> None:
    nn.utils.clip_grad_norm_(parameters, norm)


def set_rate(optimizer: Optimizer, settings: Settings, *, minibatch: int, steps: int) -> None:
    """The learning rate for a minibatch, counted from 0 over all epochs of so many steps each."""
    schedule, warmup = SCHEDULES[settings.schedule], round(settings.warmup * steps)
    for group in optimizer.param_groups:
        group["lr"] = schedule(minibatch, warmup, settings.epochs * steps) * settings.lr


Schedule = Callable[[int, int, int], float]


def cosine(step: int, warmup: int, total: int) -> float:
    """Linear rise over `warmup` steps, then half a cosine to zero."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(total - warmup, 1)))


def onecycle(step: int, warmup: int, total: int) -> float:
    """Linear rise over the first 30 % of the steps, linear fall to zero; `warmup` plays no part."""
    peak = max(round(0.3 * total), 1)
    return (step + 1) / peak if step < peak else (total - step) / max(total - peak, 1)


def constant(step: int, warmup: int, total: int) -> float:
    """Linear rise over `warmup` steps, then one."""
    return (step + 1) / warmup if step < warmup else 1.0


SCHEDULES: dict[str, Schedule] = {"cosine": cosine, "onecycle": onecycle, "constant": constant}
