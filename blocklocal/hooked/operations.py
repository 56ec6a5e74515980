"""The operations of the blocks that borders make of a forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import nn

from blocklocal.hooked.probe import Output, one_pass, run
from blocklocal.values import Inputs, tensors


def segment_operations(
    model: nn.Module, names: Sequence[str], example: Inputs, *, output: Output
) -> list[float] | list[None]:
    """Of each block before a border, the floating-point operations of a forward pass for one sample, an addition being
    one. All None where this torch cannot count them."""
    try:
        from torch.utils.flop_counter import FlopCounterMode  # here, since it needs a name that is not public
    except ImportError:
        return [None] * len(names)
    totals = [0]

    with one_pass(model, example), FlopCounterMode(display=False) as counter:

        def at_border(name: str, returned: object) -> object:
            totals.append(counter.get_total_flops())
            return returned

        run(model, example, names=names, at_border=at_border, output=output)
    batch = len(next(tensors(example)))
    return [(after - before) / batch for before, after in pairwise(totals)]
