"""Forward hooks on the submodules of a model, which do nothing but for the passes that ask for them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from blocklocal.values import features

Visit = Callable[[int, Tensor], Tensor]
"""From the index of a border and the features there to what the model goes on with."""


def _at(taps: Taps, k: int, output: object) -> object:
    return taps.at(k, output)


_CALL: list[Callable[[Taps, int, object], object]] = [_at]
"""What a tap calls. Nothing is compiled before torch._dynamo is imported, which takes seconds and is left to others."""


class Taps:
    """A tap on each of the submodules `names` of `model`, in the order in which a forward pass calls them.

    The hooks stay where they are, so that code that was compiled with them stays valid; `remove` takes them away.
    """

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        self.names = list(names)
        self._visit: Visit | None = None
        self._next = 0
        self._handles = [
            model.get_submodule(name).register_forward_hook(_Tap(self, k)) for k, name in enumerate(self.names)
        ]

    @contextmanager
    def visited(self, visit: Visit) -> Iterator[None]:
        """For one forward pass of the model. ValueError: a border that the pass does not come to, or comes to twice."""
        if self._visit is not None:
            raise ValueError("a forward pass with borders has begun inside another: let the first one end")
        if not self._handles and self.names:
            raise ValueError("the borders were removed from the model: make a new learner")
        if "torch._dynamo" in sys.modules and _CALL[0] is _at:  # a layer may be compiled, and the hook with it
            _CALL[0] = torch.compiler.disable(_at)  # pyright: ignore[reportArgumentType, reportCallIssue]
        self._visit, self._next = visit, 0
        try:
            yield
            if self._next < len(self.names):
                raise ValueError(f"this forward pass did not call {self.names[self._next]!r}, where a border stands")
        finally:
            self._visit = None

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    @property
    def active(self) -> bool:
        return self._visit is not None

    def at(self, k: int, output: object) -> object:
        """What the model goes on with after submodule `names[k]` has returned `output`."""
        assert self._visit is not None
        if k != self._next:
            raise ValueError(
                f"{self.names[k]!r} is called twice in one forward pass, or is inside a module that activation "
                "checkpointing runs again: a border needs a submodule that is called once"
                if k < self._next
                else f"this forward pass did not call {self.names[self._next]!r} before {self.names[k]!r}, as "
                "example= did"
            )
        self._next = k + 1
        found = features(output)
        if found is None:
            raise ValueError(f"{self.names[k]!r} returns no tensor of features in this forward pass")
        h, rebuild = found
        return rebuild(self._visit(k, h))


class _Tap:
    def __init__(self, taps: Taps, k: int) -> None:
        self.taps, self.k = taps, k

    def __call__(self, module: nn.Module, arguments: Any, output: Any) -> Any:
        return _CALL[0](self.taps, self.k, output) if self.taps.active else None
