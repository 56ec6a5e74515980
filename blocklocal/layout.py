"""Which dimension of a block's output holds its channels, inferred from the weights that write and read it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from blocklocal.arguments import require

Layout = Literal["vector", "tokens", "signal", "map"]
"""vector (B, D); tokens (B, T, D) or (B, H, W, D), channels last; signal (B, C, L) and map (B, C, H, W), channels
first."""

FIRST = {
    *(F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d),
    *(F.batch_norm, F.instance_norm, F.group_norm),
}
LAST = {F.linear, F.bilinear, F.layer_norm, F.rms_norm, F.embedding, F.multi_head_attention_forward}
PRODUCTS = {torch.matmul, Tensor.matmul, Tensor.__matmul__}


@dataclass(frozen=True)
class Channels:
    """A dimension of a tensor, and whether it is certain or only inferred from sizes."""

    axis: int
    sure: bool


class Reading(TorchFunctionMode):
    """Records, as a block runs on h, which dimension of h its first weight reads as channels, and what weights write.

    read: None if no weight reads h or a tensor of its sizes. written: shape and channel dimension of each result.
    """

    def __init__(self, h: Tensor) -> None:
        super().__init__()
        self.h = h
        self.read: Channels | None = None
        self.written: list[tuple[torch.Size, int]] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        first = func in FIRST
        if first or func in LAST or (func in PRODUCTS and isinstance(args[1], nn.Parameter)):
            given = args[0] if args else kwargs["input"]
            result = output[0] if isinstance(output, tuple) else output
            self.read = self.read or self._reads(given, axis=1 if first else given.dim() - 1)
            self.written.append((result.shape, 1 if first else result.dim() - 1))
        return output

    def _reads(self, given: Tensor, *, axis: int) -> Channels | None:
        h = self.h
        if given.untyped_storage() is h.untyped_storage():  # a view of h: the stride tells which dimension it is
            channels = given.shape[axis], given.stride(axis)
            found = [d for d in range(1, h.dim()) if (h.shape[d], h.stride(d)) == channels]
            return Channels(found[0], sure=True) if len(found) == 1 else None
        if given.dim() == h.dim() and (given.shape[0], given.shape[axis]) == (h.shape[0], h.shape[axis]):
            return Channels(axis, sure=False)
        return None


class Readings(TorchFunctionMode):
    """A reading for each of the blocks that run one after the other while this is active; `begin` starts the next."""

    def __init__(self, h: Tensor) -> None:
        super().__init__()
        self.all = [Reading(h)]

    def begin(self, h: Tensor) -> None:
        self.all.append(Reading(h))

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return self.all[-1].__torch_function__(func, types, args, kwargs)


def find_layout(h: Tensor, *, before: Reading, after: Reading) -> Layout | None:
    """The layout of h, from the weights of the block before it and the block after it; None if they do not tell."""
    if h.dim() == 2:
        return "vector"
    read = after.read
    if read is None or not read.sure:
        fitting = [axis for shape, axis in before.written if len(shape) == h.dim() and shape[axis] == h.shape[axis]]
        axes = {read.axis for read in [read] if read} | set(fitting[-1:])
        if len(axes) != 1:
            return None
        axis = axes.pop()
    else:
        axis = read.axis
    if axis == 1:
        return "map" if h.dim() > 3 else "signal"
    return "tokens" if axis == h.dim() - 1 else None


def find_layouts(outputs: Sequence[Tensor], readings: Sequence[Reading]) -> list[Layout | None]:
    """The layout at each border of a chain, from its blocks' outputs and what was recorded while they ran."""
    return [
        find_layout(h, before=before, after=after)
        for h, before, after in zip(outputs, readings, readings[1:], strict=False)
    ]


def given_layouts(layout: Layout | Sequence[Layout] | None, *, borders: int) -> list[Layout | None]:
    """One layout per border from the user's argument: one for all borders, or one for each."""
    if layout is not None:
        require(layout, Sequence, name="layout", needed=f"choose {', '.join(get_args(Layout))}, or pass one per border")
    layouts: list[Layout | None] = [layout] * borders if layout is None or isinstance(layout, str) else list(layout)
    for given in layouts:
        if given is not None and given not in get_args(Layout):
            raise ValueError(f"layout={given!r} is unknown: choose {', '.join(get_args(Layout))}")
    if len(layouts) != borders:
        raise ValueError(f"layout= has {len(layouts)} entries for {borders} borders: pass one for each, or one for all")
    return layouts
