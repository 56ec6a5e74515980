"""Memory and initial weights for one rank's blocks of a model that was built on the meta device."""

from __future__ import annotations

import torch

from blocklocal.initialisation import initialise, initialisers
from blocklocal.pipeline.stage import LocalStep


def materialize(step: LocalStep, *, device: torch.device, seed: int) -> LocalStep:
    """Move a block to `device`, and initialise it if it was built on the meta device.

    Its modules are initialised by their own `reset_parameters`, from `seed` and the block's index, so that they are the
    same on every rank. ValueError: a module on the meta device that holds tensors and cannot initialise them.
    """
    if not any(tensor.is_meta for tensor in (*step.parameters(), *step.buffers())):
        return step.to(device)
    initialisers(step, k=step.k)  # refuses before there is memory
    step.to_empty(device=device)
    initialise(step, k=step.k, seed=seed, device=device)
    return step
