"""The first values of a block that was built on the meta device, made when it is needed first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from blocklocal.arguments import describe, require
from blocklocal.initialisation import initialise, initialisers


class Start:
    """Initialises blocks, each as one process of a pipeline would, or loads the model's weights.

    units: each block with its border. weights: a state dict of the model, one tensor of which is read at a time;
    borders, and buffers outside the state dict, begin as without it. ValueError: a module that cannot initialise its
    tensors; weights of another model.
    """

    def __init__(
        self, model: nn.Module, units: Sequence[nn.Module], *, seed: int, weights: Mapping[str, Tensor] | None
    ) -> None:
        self._model, self._units, self._seed = model, units, seed
        self._weights = {} if weights is None else weights
        given = {} if weights is None else self._checked(weights)
        self._given = [{name for name, tensor in given.items() if tensor in set(_tensors(unit))} for unit in units]
        """For each unit, the names of the tensors that are loaded."""
        for k, unit in enumerate(units):
            initialisers(unit, k=k, given=set(given.values()))

    @torch.no_grad()
    def __call__(self, k: int, *, device: torch.device) -> None:
        """Initialise block k, whose tensors have memory on `device`. ValueError: a module that replaces its tensors."""
        own = set(_tensors(self._units[k]))
        model = dict((*self._model.named_parameters(), *self._model.named_buffers()))
        given = {name: model[name] for name in self._given[k]}
        initialise(self._units[k], k=k, seed=self._seed, device=device, given=set(given.values()))
        for name, tensor in given.items():
            tensor.copy_(self._weights[name])
        if set(_tensors(self._units[k])) != own:
            raise ValueError(f"reset_parameters() of a module in block {k} replaces its tensors: fill them in place")

    def _checked(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The model's tensors by name."""
        require(weights, Mapping, name="weights", needed="pass a state dict of the model")
        own = _state(self._model)
        if missing := sorted(own.keys() - weights.keys()):
            raise ValueError(f"weights has no {missing[0]!r}: pass a state dict of the model")
        if unknown := sorted(set(weights) - own.keys()):
            raise ValueError(f"weights has {unknown[0]!r}, which the model has not: pass a state dict of the model")
        for name, tensor in own.items():
            found = weights[name]
            if not isinstance(found, Tensor) or found.shape != tensor.shape or found.is_meta:
                raise ValueError(
                    f"weights[{name!r}] is {describe(found)}, but the model's has shape {tuple(tensor.shape)}"
                )
        return own


def _state(model: nn.Module) -> dict[str, Tensor]:
    """The parameters and buffers that the model's state dict has."""
    return {name: t for name, t in model.state_dict(keep_vars=True).items() if isinstance(t, Tensor)}


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]
