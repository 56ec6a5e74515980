"""Tensors that come and go together, and what stands in for them in the meantime.

Parameters, buffers and optimizer state keep their identity: a tensor that is elsewhere has its shape, and one number
for all of its elements, which is not a number where the dtype has one.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterable, Mapping
from itertools import pairwise

import torch
from torch import Tensor

from blocklocal.internals import version_of
from blocklocal.offload.store import Store

TRIM = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None


class Part:
    """The tensors that `find` returns by name, kept together under `key` of a store.

    Tensors of a single number stay, as do those whose elements share memory.
    """

    def __init__(self, key: str, find: Callable[[], Mapping[str, Tensor]]) -> None:
        self.key, self.find = key, find
        self.outlines: dict[str, Tensor] = {}
        """What is elsewhere, on the meta device; nothing while this part is here."""
        self._versions: dict[str, int] = {}

    def here(self) -> dict[str, Tensor]:
        """The tensors that can go, and are not elsewhere."""
        return {name: tensor for name, tensor in self.find().items() if can_go(tensor)}

    def staying(self) -> dict[str, Tensor]:
        """The tensors that stay."""
        tensors = self.find()
        return {name: t for name, t in tensors.items() if not can_go(t) and name not in self.outlines}

    def written(self) -> bool:
        """Whether a tensor has changed or been replaced since this part came."""
        return any(self._versions.get(name) != version_of(tensor) for name, tensor in self.here().items())

    def put(self, store: Store) -> None:
        store.put(self.key, {name: tensor.detach() for name, tensor in self.here().items()})

    def release(self) -> None:
        """Replace the values by stand-ins."""
        here = self.here()
        outlines = outlined(here)
        for tensor in here.values():
            tensor.data = stand_in(tensor)
        self.leave(self.outlines | outlines)

    def leave(self, outlines: Mapping[str, Tensor]) -> None:
        """From now on the tensors of these names are elsewhere."""
        tensors = self.find()
        self.outlines = {name: outline for name, outline in outlines.items() if name in tensors}
        self._note(self.outlines)

    def fetch(self, store: Store, *, device: torch.device) -> None:
        """Bring back what is elsewhere. ValueError: see `wanted`."""
        if self.outlines:
            wanted = self.wanted()
            self.fill(store.get(self.key, wanted, device=device) if wanted else {})

    def prefetch(self, store: Store, *, device: torch.device) -> None:
        if self.outlines and (wanted := self.wanted()):
            store.prefetch(self.key, wanted, device=device)

    def fill(self, fresh: Mapping[str, Tensor]) -> None:
        """Give the tensors that are elsewhere these values."""
        tensors = self.find()
        for name, values in fresh.items():
            tensors[name].data = values
        self.outlines = {}
        self._note(self.here())

    def wanted(self) -> dict[str, Tensor]:
        """The outlines of what is still elsewhere, and was not replaced in the meantime.

        ValueError: a tensor was written to in the meantime.
        """
        tensors = self.find()
        wanted = {name: o for name, o in self.outlines.items() if name in tensors and elsewhere(tensors[name])}
        for name in wanted:
            if version_of(tensors[name]) != self._versions[name]:
                raise ValueError(
                    f"{name!r} was written to while its block was elsewhere, where this is lost: change weights before "
                    "offload(), or after offloaded.end()"
                )
        return wanted

    def _note(self, names: Iterable[str]) -> None:
        tensors = self.find()
        self._versions = {name: version_of(tensors[name]) for name in names}


def can_go(tensor: Tensor) -> bool:
    dense = tensor.layout is torch.strided and tensor.untyped_storage().nbytes() >= tensor.nbytes
    return dense and tensor.numel() > 1


def elsewhere(tensor: Tensor) -> bool:
    """Whether all elements of a tensor are one number in memory, as in a stand-in."""
    return tensor.layout is torch.strided and tensor.numel() > 1 and not any(tensor.stride())


def stand_in(tensor: Tensor, *, device: torch.device | None = None) -> Tensor:
    real = tensor.is_floating_point() or tensor.is_complex()
    one = torch.tensor(float("nan") if real else 0, device=device or tensor.device).to(tensor.dtype)
    return one.expand(tensor.shape)


def outlined(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Shapes, strides and dtypes, as tensors on the meta device."""
    return {name: torch.empty_like(tensor, device="meta") for name, tensor in tensors.items()}


def require_apart(tensors: Iterable[tuple[str, Tensor]]) -> None:
    """ValueError: two of the tensors share memory, which they would no longer do once they have been elsewhere."""
    spans = sorted((tensor.data_ptr(), _reach(tensor), name) for name, tensor in tensors if can_go(tensor))
    for (begin, length, name), (following, _, other) in pairwise(spans):
        if following < begin + length:
            raise ValueError(
                f"{name!r} and {other!r} share memory, and an offloaded block keeps each apart: clone() one"
            )


def give_back() -> None:
    """Return memory that was freed to the system: glibc keeps it in pieces that the next block may not fit into."""
    if TRIM is not None:
        TRIM(0)


def _reach(tensor: Tensor) -> int:
    """Bytes from the first element to behind the last one."""
    steps = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (steps + 1) * tensor.itemsize
