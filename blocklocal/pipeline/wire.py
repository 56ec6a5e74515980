"""How tensors travel: as their elements in memory order, with a description of how to read them.

A tensor arrives with the dtype and the strides that it had, since the last bits of arithmetic depend on them: autocast
determines the dtype, the memory format (such as channels_last) the strides.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from blocklocal.arguments import first_line
from blocklocal.messages import memory_order

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of a message: (rows, *shape) for a minibatch with that number of rows, sent as `dtype`."""

    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Form:
    """The dtype of a dense tensor, and its dimensions from the outermost to the innermost in memory."""

    dtype: torch.dtype
    order: tuple[int, ...]

    @staticmethod
    def of(h: Tensor) -> Form:
        return Form(h.dtype, memory_order(h))

    def fits(self, h: Tensor) -> bool:
        return h.dtype == self.dtype and h.permute(self.order).is_contiguous()

    def elements(self, h: Tensor, *, dtype: torch.dtype) -> Tensor:
        """The elements of h in memory order, as `dtype`."""
        return h.permute(self.order).reshape(-1).to(dtype)

    def tensor(self, elements: Tensor, *, shape: Sequence[int]) -> Tensor:
        """The tensor of this shape with these elements; it may share their memory."""
        inner = elements.view([shape[d] for d in self.order])
        return inner.permute([self.order.index(d) for d in range(len(shape))]).to(self.dtype)

    def numbers(self) -> list[int]:
        return [DTYPES.index(self.dtype), *self.order]

    @staticmethod
    def read(numbers: Sequence[int]) -> Form:
        return Form(DTYPES[numbers[0]], tuple(numbers[1:]))


def started(work: dist.Work | None) -> dist.Work:
    assert work is not None  # None is for processes outside the group
    return work


def wait(work: dist.Work, *, failure: str, timeout: timedelta, device: torch.device) -> None:
    """Wait for `work`. RuntimeError: `failure`, after `timeout`; on a GPU the process group's timeout applies."""
    try:
        if device.type == "cpu":
            work.wait(timeout)
        else:
            work.wait()
    except RuntimeError as error:
        raise RuntimeError(f"{failure} within {timeout.total_seconds():g} s ({first_line(error)})") from error


def digest(*given: Tensor) -> int:
    """A number that depends on the values and order of tensors; zero if one is not on the CPU, to avoid a wait."""
    total = 0
    for number, y in enumerate(given, start=1):
        if y.device.type != "cpu":
            return 0
        integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[y.element_size()]
        bits = y.contiguous().view(integers).flatten().long()
        total += number * int((bits * torch.arange(1, len(bits) + 1)).sum())
    return (total + 2**63) % 2**64 - 2**63  # as an int64 of a message
