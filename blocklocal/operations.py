"""How many operations a module takes: those of matrix products and convolutions, which all other costs follow."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


@torch.no_grad()
def operations(forward: Callable[[Tensor], object], h: Tensor) -> float:
    """Floating-point operations of a forward pass for one sample of h (B, ...), an addition being one.

    >>> operations(torch.nn.Linear(8, 4), torch.zeros(2, 8))
    64.0
    """
    from torch.utils.flop_counter import FlopCounterMode  # here, since it stands on names of torch that are not public

    with FlopCounterMode(display=False) as counter:
        forward(h)
    return counter.get_total_flops() / len(h)
