"""The values that the tensors of a model begin with, without memory for those that are not wanted.

A model draws its weights in its constructor, from one stream of random numbers, some of them twice. So the constructor
runs as it is, but of the tensors that are not wanted only the last one written has memory: the same numbers are drawn.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Container, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from blocklocal.internals import OperationMode
from blocklocal.lab.environment import give_back_freed_memory
from blocklocal.values import tensors

KINDS = ("empty", "zeros", "ones", "full", "rand", "randn")
SHAPE_ALONE = {*(f"{kind}_like" for kind in KINDS), *(f"new_{kind}" for kind in KINDS)}
"""Operations that read no value of their argument."""
LARGE = 2**20  # bytes that are worth giving back
FILLS = {"normal_", "uniform_", "zero_", "fill_", "exponential_", "bernoulli_", "random_"}
"""Operations that write all of their argument and read nothing of it."""


class Unsuited(Exception):
    """A constructor that uses the values of a tensor that is not wanted, or differs from one call to the next."""


class Numbering(OperationMode):
    """Numbers the memory of all tensors that operations make while it is active, in order.

    spared: the numbers of those that are not wanted. Of these only the last one written has memory, and values until
    another is. Unsuited: values are read that are no longer there.
    """

    def __init__(self, spared: Container[int] = ()) -> None:
        super().__init__()
        self.spared, self._count = spared, 0
        self._known: dict[int, tuple[int, int]] = {}  # by the id of a storage: its number and its bytes
        self._present: torch.UntypedStorage | None = None  # the one of those spared that has memory
        self._valid = False
        self.unsuited = ""
        """The operation that has read what was not there, even if the constructor has gone on."""

    def number(self, tensor: Tensor) -> int | None:
        """The number of a tensor's memory; None if no operation has made it."""
        return self._known.get(id(tensor.untyped_storage()), (None, 0))[0]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().removeprefix("aten::").partition(".")[0]
        lost = [tensor for tensor in self._spared((args, kwargs)) if not self._there(tensor)]
        fills = name in FILLS and len(lost) == 1 and lost[0] is args[0] and self._whole(lost[0])
        for tensor in lost:
            self._give(tensor)
        output = func(*args, **(kwargs or {}))
        made = list(tensors(output))
        for tensor in made:
            self._count_in(tensor.untyped_storage())
        spared = self._spared(made)
        if lost and not fills and name not in SHAPE_ALONE and (len(spared) < len(made) or not made):
            self.unsuited = name
            raise Unsuited(name)
        for tensor in (*lost, *spared):
            self._keep(tensor, valid=fills or not lost)
        return output

    def _spared(self, value: object) -> list[Tensor]:
        numbers = ((tensor, self.number(tensor)) for tensor in tensors(value))
        return [tensor for tensor, number in numbers if number is not None and number in self.spared]

    def _there(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage() is self._present and self._valid

    def _whole(self, tensor: Tensor) -> bool:
        return tensor.numel() * tensor.itemsize == self._known[id(tensor.untyped_storage())][1]

    def _give(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        storage.resize_(self._known[id(storage)][1])

    def _keep(self, tensor: Tensor, *, valid: bool) -> None:
        """This is the one that has memory from now on."""
        storage = tensor.untyped_storage()
        if self._present is not None and self._present is not storage:
            large = self._present.nbytes() >= LARGE
            self._present.resize_(0)
            if large:
                give_back_freed_memory()
        self._present, self._valid = storage, valid

    def _count_in(self, storage: torch.UntypedStorage) -> None:
        if id(storage) not in self._known:
            self._known[id(storage)] = (self._count, storage.nbytes())
            self._count += 1
            weakref.finalize(storage, self._known.pop, id(storage))


class Moving(OperationMode):
    """Keeps what is moved to the meta device while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self._sources: dict[int, Tensor] = {}

    def source(self, tensor: Tensor) -> Tensor:
        """What a tensor on the meta device was before. KeyError: it was never elsewhere."""
        return self._sources[id(tensor.untyped_storage())]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if func.name().startswith("aten::_to_copy") and output.is_meta and not args[0].is_meta:
            self._sources[id(output.untyped_storage())] = args[0]
        return output


def on_meta(build: Callable[[], nn.Module]) -> tuple[nn.Module, dict[str, int]]:
    """A model on the meta device, and the number of each of its tensors, by name. Unsuited: it does not go there."""
    with Numbering() as numbering, torch.device("meta"):
        model = build()
    return model, _numbers(model, numbering)


def values_of(build: Callable[[], nn.Module], *, wanted: Collection[str], numbers: dict[str, int]) -> dict[str, Tensor]:
    """The tensors of these names of a new model. numbers: of all its tensors, see `on_meta`.

    The model draws the same random numbers as if it were built whole. Unsuited: see `Numbering`.
    """
    kept = {numbers[name] for name in wanted}
    with Numbering({number for number in numbers.values() if number not in kept}) as numbering:
        model = build()
    if numbering.unsuited or _numbers(model, numbering) != numbers:
        raise Unsuited(numbering.unsuited or "other tensors than on the meta device")
    return {name: tensor.detach() for name, tensor in _named(model) if name in wanted}


def _numbers(model: nn.Module, numbering: Numbering) -> dict[str, int]:
    found = {name: numbering.number(tensor) for name, tensor in _named(model)}
    known = {name: number for name, number in found.items() if number is not None}
    if len(known) < len(found):
        raise Unsuited("a tensor that was there before")
    return known


def _named(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()
