"""What the blocks of a chain take of the inputs of their model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from blocklocal.arguments import describe
from blocklocal.block import Block
from blocklocal.values import Arguments, Inputs, arguments_of


class SideInputs:
    """The inputs of `model` by block. Those that a later block reads beside the features are its side inputs.

    example: an input of the model, which later ones must be like. Blocks that were not cut from the model have no side
    inputs.
    """

    def __init__(self, model: nn.Module, blocks: Iterable[nn.Module], *, example: Inputs | None) -> None:
        self._reads = [block.inputs[k > 0 :] if isinstance(block, Block) else None for k, block in enumerate(blocks)]
        self._names, self._shapes, self._constants = (), None, {}
        if example is not None:
            given = arguments_of(model, example)
            self._names = given.names
            self._shapes = {name: tuple(tensor.shape) for name, tensor in given.tensors().items()}
            self._constants = given.constants()
        self._kind = type(example) if isinstance(example, Tensor | tuple) else Mapping

    def read_by(self, k: int) -> list[str]:
        """The names of the side inputs of block k."""
        return (self._reads[k] or []) if k > 0 else []

    def all(self) -> list[str]:
        """The names of all side inputs."""
        return list(dict.fromkeys(name for k in range(len(self._reads)) for name in self.read_by(k)))

    def check(self, x: Inputs) -> None:
        """TypeError, ValueError: x is not like the example: other inputs, or one with other dimensions."""
        self.check_kind(x, name="x")
        if self._shapes is None:
            return
        given = self._arguments(x)
        tensors, constants = given.tensors(), given.constants()
        for name in {**self._shapes, **self._constants, **tensors, **constants}:
            then = name in self._shapes, self._constants.get(name)
            now = name in tensors, constants.get(name)
            if then != now:
                raise ValueError(
                    f"input {name!r} of x is {_said(now)}, but that of example= was {_said(then)}: the blocks were "
                    "made for the example's inputs; pass the same ones, or make another learner"
                )
        for name, tensor in tensors.items():
            if tensor.dim() != len(self._shapes[name]):
                raise ValueError(
                    f"{'x' if self._kind is Tensor else f'input {name!r} of x'} has shape {tuple(tensor.shape)}, but "
                    f"example= had {self._shapes[name]}: a batch of {len(self._shapes[name])} dimensions is needed"
                )

    def check_kind(self, x: object, *, name: str) -> None:
        """TypeError: neither a tensor, nor a tuple, nor a dict, or another of them than the example."""
        kind = Tensor | tuple | Mapping if self._shapes is None else self._kind
        if not isinstance(x, kind):
            needed = {Tensor: "a torch.Tensor", tuple: "a tuple", Mapping: "a dict"}.get(self._kind, "a torch.Tensor")
            raise TypeError(f"{name} is {describe(x)}: pass {needed} of inputs, as example= was")

    def call(self, k: int, h: Any, x: Inputs | None) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of block k: for block 0 those made of x, for a later one the features h and its side inputs."""
        names = self._reads[k]
        if k > 0 and not names:
            return (h,), {}
        if x is None:
            raise ValueError(
                f"block {k} reads {', '.join(map(repr, names or ['x']))} of the model's inputs: pass x=, the batch's "
                "input"
            )
        given = self._arguments(x)
        if names is None:
            return given.args, dict(given.kwargs)
        tensors = given.tensors()
        return (*([h] if k > 0 else []), *(tensors[name] for name in names)), {}

    def tensors(self, x: Inputs) -> dict[str, Tensor]:
        """All tensors of x, by name."""
        return self._arguments(x).tensors()

    def _arguments(self, x: Inputs) -> Arguments:
        if isinstance(x, Mapping):
            return Arguments((), x, ())
        args = x if isinstance(x, tuple) else (x,)
        return Arguments(args, {}, self._names or tuple(f"x{i}" for i in range(len(args))))


def _said(found: tuple[bool, Any]) -> str:
    is_tensor, constant = found
    return "a tensor" if is_tensor else describe(constant)
