"""Memory and initial weights for one rank's blocks of a model that was built on the meta device."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from blocklocal.pipeline.seeding import seeded
from blocklocal.pipeline.stage import LocalStep


def materialize(step: LocalStep, *, device: torch.device, seed: int) -> LocalStep:
    """Move a block to `device`, and initialise it if it was built on the meta device.

    Its modules are initialised by their own `reset_parameters`, from `seed` and the block's index, so that they are the
    same on every rank. ValueError: a module on the meta device that holds tensors and cannot initialise them.
    """
    if not any(tensor.is_meta for tensor in (*step.parameters(), *step.buffers())):
        return step.to(device)
    resets = [_reset(name, module, k=step.k) for name, module in step.named_modules() if _holds_tensors(module)]
    step.to_empty(device=device)
    with seeded(seed, step.k, device=device):
        for reset in resets:
            reset()
    return step


def _holds_tensors(module: nn.Module) -> bool:
    return any(True for _ in (*module.parameters(recurse=False), *module.buffers(recurse=False)))


def _reset(name: str, module: nn.Module, *, k: int) -> Callable[[], object]:
    reset = getattr(module, "reset_parameters", None)
    if not callable(reset):
        raise ValueError(
            f"{name!r} of block {k}, a {type(module).__name__}, is on the meta device and has no reset_parameters() "
            "to initialise it: write one, move the tensors of a container that is cut into a submodule, or "
            "build the model on a real device"
        )
    return reset
