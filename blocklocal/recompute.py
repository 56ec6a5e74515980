"""Activation checkpointing: a module's activations are computed again in the backward pass instead of being kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from blocklocal.arguments import require_module

NORMS = (
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
    nn.SyncBatchNorm,
    nn.InstanceNorm1d,
    nn.InstanceNorm2d,
    nn.InstanceNorm3d,
)
"""The normalisation layers that may keep running statistics, in buffers that a forward pass updates."""


def recompute(module: nn.Module) -> None:
    """Make `module` keep only its input for the backward pass, and run its forward pass again there; in place.

    For whole units, such as residual units, inside a block: half the memory or less, for a third more time. Outputs,
    gradients, dropout masks and parameter names stay the same; running statistics of normalisation layers are updated
    once per step. Other state that a forward pass changes is changed twice. The model is then cut around the module,
    never inside it. A second call changes nothing.

    >>> model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 4)))
    >>> recompute(model[1])
    """
    require_module(module, name="module")
    if isinstance(module, torch.jit.ScriptModule):
        raise ValueError("module is a ScriptModule, which cannot be run again: pass its original module")
    if not is_recomputed(module):
        module.forward = _Recomputed(module, module.forward).run


def is_recomputed(module: nn.Module) -> bool:
    """Whether `recompute` has been applied to this module itself."""
    forward = vars(module).get("forward")
    return isinstance(getattr(forward, "__self__", None), _Recomputed)


class _Recomputed:
    """Its method `run` replaces `forward`: a copy of a module also copies the object that a method is bound to."""

    def __init__(self, module: nn.Module, forward: Callable[..., object]) -> None:
        self.module, self.forward = module, forward

    def run(self, *args: object, **kwargs: object) -> object:
        forward = partial(self.forward, **kwargs)
        if not torch.is_grad_enabled():
            return forward(*args)
        if torch.compiler.is_compiling():  # recomputation in a compiled graph leaves statistics alone
            return checkpoint(forward, *args, use_reentrant=False)
        return checkpoint(forward, *args, use_reentrant=False, context_fn=self._contexts)

    def _contexts(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), _statistics_kept(self.module)


@contextmanager
def _statistics_kept(module: nn.Module) -> Iterator[None]:
    """Freeze the running statistics of `module`, which the first forward pass has already updated."""
    norms = [norm for norm in module.modules() if isinstance(norm, NORMS)]
    saved = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    try:
        for norm in norms:
            norm.momentum, norm.num_batches_tracked = 0.0, None
        yield
    finally:
        for norm, (momentum, tracked) in zip(norms, saved, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, tracked
