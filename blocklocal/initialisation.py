"""Initial weights of one block of a model that was built on the meta device, the same wherever they are made."""

from __future__ import annotations

from collections.abc import Callable, Container

import torch
from torch import Tensor, nn

from blocklocal.seeding import seeded


def initialisers(module: nn.Module, *, k: int, given: Container[Tensor] = frozenset()) -> list[Callable[[], object]]:
    """The `reset_parameters` of each module inside block k that holds tensors which are not `given`, in order.

    ValueError: such a module that has none.
    """
    parts = module.named_modules()
    return [_reset(name, part, k=k) for name, part in parts if any(tensor not in given for tensor in _own(part))]


def initialise(
    module: nn.Module, *, k: int, seed: int, device: torch.device, given: Container[Tensor] = frozenset()
) -> None:
    """Initialise the modules of block k on `device`; the draws depend on `seed` and k alone."""
    resets = initialisers(module, k=k, given=given)
    with seeded(seed, k, device=device):
        for reset in resets:
            reset()


def _own(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(recurse=False), *module.buffers(recurse=False)]


def _reset(name: str, module: nn.Module, *, k: int) -> Callable[[], object]:
    reset = getattr(module, "reset_parameters", None)
    if not callable(reset):
        raise ValueError(
            f"{name!r} of block {k}, a {type(module).__name__}, is on the meta device and has no reset_parameters() "
            "to initialise it: write one, move the tensors of a container that is cut into a submodule, or "
            "build the model on a real device"
        )
    return reset
