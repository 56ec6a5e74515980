"""Prediction of a hooked model after training: the model up to an exit, as a module of its own."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from blocklocal.exits import Exit, ExitPool
from blocklocal.hooked.taps import Taps
from blocklocal.messages import add_belief

READ = "this pass reads the weight {!r} of a later block, as example= did not: use a later exit"
_CALL = nn.Module.__call__


@contextmanager
def _calls_unseen() -> Iterator[None]:
    """Modules are called as torch defines it. torch.export replaces the call by one that counts who was entered and
    left, which an exit that ends the pass leaves out of step; weights and operations are recorded all the same."""
    replaced = nn.Module.__call__
    if replaced is _CALL:
        yield
        return
    nn.Module.__call__ = _CALL
    try:
        yield
    finally:
        nn.Module.__call__ = replaced


class Left(Exception):
    """Ends a forward pass at an early exit."""

    def __init__(self, prediction: Tensor) -> None:
        super().__init__()
        self.prediction = prediction


class Absent:
    """In the place of a weight of a later block: its type and shape can be read, and what is computed of it fails."""

    name = ""

    def __init__(self, name: str, weight: Tensor) -> None:
        self.name, self.shape, self.dtype, self.device = name, weight.shape, weight.dtype, weight.device

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        absent = next((part for part in [*args, *(kwargs or {}).values()] if isinstance(part, cls)), cls)
        raise ValueError(READ.format(absent.name))

    def __getattr__(self, attribute: str) -> None:
        raise AttributeError(READ.format(self.name))


class HookedPredictor(nn.Module):
    """A trained model as one module that takes what the model takes and returns the prediction of its last exit.

    model, taps: copies of the learner's, see `copied`. exits: one for each exit up to the last that is used, None where
    none is read; that of the model itself is None. pool: combines the predictions of all exits; without it the last
    predicts. output: from what the model returns to its prediction. add_beliefs: see `BlockLocal`; every exit is then
    used.
    """

    def __init__(
        self,
        model: nn.Module,
        taps: Taps,
        exits: Iterable[Exit | None],
        *,
        output: Callable[[Any], Tensor],
        pool: ExitPool | None,
        add_beliefs: bool,
    ) -> None:
        super().__init__()
        self.model, self.output = model, output
        self.exits = nn.ModuleList(nn.Identity() if exit is None else exit for exit in exits)
        self.pool, self.adds_beliefs = pool, add_beliefs
        self._taps = taps

    def forward(self, *inputs: Any, **named: Any) -> Tensor:
        """ValueError: a pass that reads a weight of a later block, which is not here."""
        predictions: list[Tensor] = []
        last = len(self.exits) - 1

        def visit(k: int, h: Tensor) -> Tensor:
            predictions.append(add_belief(predictions[-1] if k and self.adds_beliefs else None, self.exits[k](h)))
            if k == last:
                raise Left(predictions[-1])
            return h

        try:
            with self._taps.visited(visit), _calls_unseen():
                returned = self.model(*inputs, **named)
        except Left as left:
            return left.prediction
        belief = predictions[-1] if predictions and self.adds_beliefs else None
        predictions.append(add_belief(belief, self.output(returned)))
        return predictions[-1] if self.pool is None else self.pool(predictions)


def copied(model: nn.Module, taps: Taps, *, without: Sequence[str]) -> tuple[nn.Module, Taps]:
    """Copies of the model and its taps that share its parameters and buffers, but for those of these names.

    ValueError: tensors that do not stay the same in a copy, as those of a ScriptModule.
    """
    tensors = [*model.parameters(), *model.buffers()]
    same, taps = copy.deepcopy((model, taps), {id(tensor): tensor for tensor in tensors})
    if any(a is not b for a, b in zip(tensors, [*same.parameters(), *same.buffers()], strict=True)):
        raise ValueError(f"{type(model).__name__} makes tensors of its own when it is copied: export the model itself")
    for name in without:
        path, _, attribute = name.rpartition(".")
        owner = same.get_submodule(path)
        absent = Absent(name, getattr(owner, attribute))
        delattr(owner, attribute)
        setattr(owner, attribute, absent)
    return same, taps
