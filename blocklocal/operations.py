"""The number of operations of a module: those of matrix products and convolutions, which all other costs follow."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from blocklocal.internals import UnsupportedTorch


@torch.enable_grad()  # which the counter's hooks need
def operations(forward: Callable[[Tensor], object], h: Tensor) -> float:
    """Floating-point operations of a forward pass for one sample of h (B, ...); an addition counts as one.

    UnsupportedTorch: this torch has no way to count them.

    >>> operations(torch.nn.Linear(8, 4), torch.zeros(2, 8))
    64.0
    """
    try:
        from torch.utils.flop_counter import FlopCounterMode  # here, since it needs a private name
    except ImportError as error:
        purpose = "counting operations"
        raise UnsupportedTorch("torch.utils._python_dispatch.TorchDispatchMode", purpose=purpose) from error
    with FlopCounterMode(display=False) as counter:
        forward(h)
    return counter.get_total_flops() / len(h)
