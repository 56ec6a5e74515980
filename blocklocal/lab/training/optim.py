"""The optimizer of a block, and its learning rate, which depends only on the number of the minibatch."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

from torch import nn
from torch.optim import SGD, Optimizer


def make_optimizer(
    parameters: list[nn.Parameter], *, lr: float, momentum: float, weight_decay: float, clip: float
) -> SGD:
    """Stochastic gradient descent with Nesterov momentum. clip: largest norm of the gradient; 0: no limit."""
    optimizer = SGD(
        [{"params": parameters}],  # a group may be empty, a list of parameters may not
        lr=lr,
        momentum=momentum,
        weight_decay=weight_decay,
        nesterov=True,
    )
    if clip:
        optimizer.register_step_pre_hook(partial(_clip, parameters, clip))
    return optimizer


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
