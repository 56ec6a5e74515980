"""Bytes alive while operations run, counted from the operations themselves, in the same way on every device.

The storage of every tensor that an operation creates is counted until its last owner releases it: activations, what
autograd saves for the backward pass, gradients of activations and parameters, temporaries between operations. A storage
counts once, however many tensors view it. Not counted: what existed before (parameters, buffers, optimizer state, the
batch), workspace inside an operation, and what compiled code allocates, since no operation shows it. Where two
gradients meet, one map too many is counted: without tracking, autograd adds the second to the first in place.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import Tensor

from blocklocal.internals import OperationMode


@dataclass
class Timeline:
    """Seconds since the start and bytes alive, one pair per change."""

    seconds: list[float] = field(default_factory=list)
    bytes: list[int] = field(default_factory=list)

    @property
    def peak(self) -> int:
        return max(self.bytes, default=0)


class MemoryTracker(OperationMode):
    """Records the timeline of the bytes alive while it is active.

    >>> import torch
    >>> with MemoryTracker() as tracker:
    ...     x = torch.zeros(256) + 1
    >>> tracker.timeline.peak, tracker.alive
    (2048, 1024)
    """

    def __init__(self) -> None:
        super().__init__()
        self.timeline = Timeline()
        self.alive = 0
        self._start = time.perf_counter()
        self._storages: dict[int, weakref.finalize] = {}

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self._start

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        given = {id(tensor.untyped_storage()) for tensor in _tensors((args, kwargs))}
        for tensor in _tensors(output):
            if id(tensor.untyped_storage()) not in given:
                self._count(tensor)
        return output

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if id(storage) not in self._storages:
            size = storage.nbytes()
            self._storages[id(storage)] = weakref.finalize(storage, self._release, id(storage), size)
            self._change(size)

    def _release(self, key: int, size: int) -> None:
        del self._storages[key]
        self._change(-size)

    def _change(self, size: int) -> None:
        self.alive += size
        self.timeline.seconds.append(self.seconds)
        self.timeline.bytes.append(self.alive)


def _tensors(value: object) -> Iterator[Tensor]:
    """The tensors in an operation's arguments or results, also inside tuples, lists and dictionaries."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple | dict):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _tensors(part)
