"""Tries a model and its learner on a few samples, before a run writes anything to disk.

Parameters, buffers, gradients and random states are unchanged afterwards, so a trial does not affect the run.
"""

from __future__ import annotations

import copy
import inspect
import random
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from blocklocal import BlockLocal
from blocklocal.inputs import check_parameters
from blocklocal.lab.errors import UserError, blame
from blocklocal.lab.runs.block_state import block_state
from blocklocal.lab.training.rules import Learning

FEW = 8  # samples that a trial takes
EXTRA = "_extra_state"  # torch's name for what get_extra_state() of a module returns


def try_model(
    model: nn.Module,
    x: Tensor,
    *,
    name: str,
    shape: tuple[int, ...],
    context: AbstractContextManager,
    targets: str | None = None,
    unit: str = "images",
) -> None:
    """Run a pass in training mode and one in evaluation mode over samples x, in `context`.

    targets: what it predicts, in words. unit: what the samples are called. UserError: no parameters to train, or one
    that overlaps itself in memory; a pass that fails, or does not give finite logits of this shape, (B, n) or, of the
    next token, (B, T, n), where those of a position must not depend on later tokens.
    """
    if any(is_lazy(parameter) for parameter in model.parameters()):
        raise UserError(f"model {name!r} has parameters without a shape: give its lazy modules their sizes")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError(f"model {name!r} has no parameters to train")
    try:
        check_parameters(model)
    except ValueError as error:
        raise UserError(f"model {name!r}: {error}") from error
    with _preserved(model, device=x.device), blame(f"model {name!r} fails on {unit} of shape {(*x.shape,)}"):
        for training in (True, False):
            model.train(training)
            with context, torch.set_grad_enabled(training):
                logits = model(x)
            fault = _fault(logits, shape=shape, targets=targets or f"{shape[-1]} classes", unit=unit, device=x.device)
            if fault:
                raise UserError(f"model {name!r} {fault}")
            if training and not logits.requires_grad:
                raise UserError(f"model {name!r} cannot learn: its output does not depend on its parameters")
        if len(shape) == 3 and _looks_ahead(model, x):
            raise UserError(
                f"model {name!r} is not causal: its logits at a position depend on later tokens, which it is to predict"
            )


def try_learning(learning: Learning, x: Tensor, y: Tensor, *, name: str, context: AbstractContextManager) -> None:
    """Run a step without an optimizer on samples x with labels y, and all exits.

    UserError: this fails, or a loss or gradient is not finite.
    """
    learner, alignment = learning.learner, learning.alignment
    state = copy.deepcopy(alignment.state_dict()) if alignment else None
    with _preserved(learner, learner.model, device=x.device), blame(f"model {name!r} fails in a training step"):
        learner.train()
        with context, learning.with_targets(y):
            losses = learner.backward(x, y)
        for k, loss in enumerate(losses):
            gradients = [parameter.grad for parameter in learner.block_parameters(k) if parameter.grad is not None]
            if not all(value.isfinite().all() for value in (loss, *gradients)):
                raise UserError(f"model {name!r}: the loss of block {k} or its gradient is not finite at the start")
        learner.eval()
        with context:
            learner.exits(x)
    if alignment and state:
        alignment.load_state_dict(state)


def try_checkpoint(learner: BlockLocal, *, name: str) -> None:
    """Save and restore the state that modules have in addition to parameters and buffers.

    UserError: it is not a tensor, or a module cannot save or restore it.
    """
    device = next(learner.parameters()).device
    with _preserved(learner, learner.model, device=device), blame(f"model {name!r} fails with its extra state"):
        for k in range(len(learner.blocks)):
            try:
                state = block_state(learner, k, None)
            except UserError as error:
                raise UserError(f"model {name!r}: {error}") from error
            extra = {key: kept for key, kept in state.items() if key.endswith(EXTRA)}
            for key in learner.load_state_dict(extra, strict=False).unexpected_keys:
                raise UserError(f"model {name!r}: {key} would not be taken back: its module needs set_extra_state()")


def _fault(logits: object, *, shape: tuple[int, ...], targets: str, unit: str, device: torch.device) -> str:
    """What is wrong with the output of a model, if anything."""
    samples = shape[0]
    if inspect.iscoroutine(logits):
        logits.close()
        return "has an async forward(), which returns no tensor: define it with def alone"
    if not isinstance(logits, Tensor):
        return f"gives an object of type {type(logits).__name__}, not a tensor of logits"
    if logits.dim() == len(shape) == 2 and len(logits) == samples and logits.shape[1] != shape[-1]:
        return f"gives {logits.shape[1]} logits per {unit[:-1]} for {targets}"
    if logits.shape != shape:
        return f"gives a tensor of shape {(*logits.shape,)} for {samples} {unit} and {targets}: it must be {shape}"
    if not logits.is_floating_point():
        return f"gives a tensor of {logits.dtype}: logits must be floating-point numbers"
    if logits.device != device:
        return f"gives a tensor on {logits.device} from {unit} on {device}: keep it there"
    if not logits.isfinite().all():
        return "gives logits that are not finite, with its initial weights"
    return ""


@torch.no_grad()
def _looks_ahead(model: nn.Module, ids: Tensor) -> bool:
    """Whether another last token changes the logits before it by more than rounding."""
    others = ids.clone()
    others[:, -1] = ids[:, -1] == 0  # 1 for 0, and 0 for any other
    logits = model(ids)[:, :-1]
    return bool(((model(others)[:, :-1] - logits).abs() > 1e-5 * logits.abs().max()).any())


@contextmanager
def _preserved(*modules: nn.Module, device: torch.device) -> Iterator[None]:
    """A context that restores modules, gradients and random states, to the bit."""
    own = {part for module in modules for part in module.modules()}
    tables = [table for part in own for table in (vars(part), *vars(part).values()) if isinstance(table, dict)]
    kept = [(table, dict(table)) for table in tables]
    parameters = {parameter for module in modules for parameter in module.parameters()}
    gradients = [(parameter, parameter.grad) for parameter in parameters]
    tensors = parameters | {buffer for module in modules for buffer in module.buffers()}
    contents = [(tensor, tensor.detach().clone()) for tensor in tensors]
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        for table, before in kept:
            table.clear()
            table.update(before)
        with torch.no_grad():
            for tensor, before in contents:
                if not torch.equal(tensor, before):  # one that shares its memory with itself cannot be written
                    tensor.copy_(before)
        for parameter, gradient in gradients:
            parameter.grad = gradient
