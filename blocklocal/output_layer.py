"""The layer of a model whose output is the prediction."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from blocklocal.arguments import describe
from blocklocal.graph import mode
from blocklocal.internals import version_of
from blocklocal.values import Inputs, call, map_tensors, prediction_of, tensors


class OutputLayer:
    """Finds the output layer of `model`, an nn.Linear, by a forward pass of `example`, or by its name.

    size: the number of its outputs. output: from what the model returns to its prediction.
    """

    def __init__(
        self, model: nn.Module, example: Inputs, *, size: int, output: Callable[[Any], Tensor] = prediction_of
    ) -> None:
        self.model, self.example, self.size, self.output = model, example, size, output

    def find(self, name: str | None) -> tuple[str, nn.Linear]:
        """The layer, under its name in the model. ValueError: there is none, or it is not what the model returns."""
        layers = dict(self.model.named_modules())
        if any(tensor.is_meta for tensor in (*self.model.parameters(), *self.model.buffers())):
            raise ValueError("the model is on the meta device, where its output layer has no weights to copy")
        if name is not None and name not in layers:
            known = [name for name, layer in layers.items() if isinstance(layer, nn.Linear)]
            raise ValueError(
                f"layer={name!r}: {type(self.model).__name__} has no such submodule; its linear layers are "
                f"{', '.join(known[-6:]) or 'none'}"
            )
        found = self._seen if name is None else name
        layer = layers[found]
        if not self._fits(layer):
            outputs = f" of {layer.out_features} outputs" if isinstance(layer, nn.Linear) else ""
            raise ValueError(
                f"layer={name!r} is a {type(layer).__name__}{outputs}: name an nn.Linear of {self.size} outputs, or "
                "use another head"
            )
        assert isinstance(layer, nn.Linear)
        return found, layer

    def _fits(self, layer: nn.Module) -> bool:
        """Whether it is a linear layer of that size, of no class that computes something else."""
        linear = isinstance(layer, nn.Linear) and layer.out_features == self.size
        return linear and type(layer).forward is nn.Linear.forward

    @cached_property
    def _seen(self) -> str:
        """The name of the linear layer whose output the model returns, as it is."""
        outputs: dict[str, tuple[Tensor, int, bool]] = {}

        def note(name: str) -> Callable[..., None]:
            def after(layer: nn.Linear, args: tuple[Tensor, ...], output: Tensor) -> None:
                expected = F.linear(args[0], layer.weight, layer.bias)
                same = output.shape == expected.shape and torch.allclose(output, expected, equal_nan=True)
                outputs[name] = output, version_of(output), same

            return after

        layers = {name: layer for name, layer in self.model.named_modules() if self._fits(layer)}
        handles = [layer.register_forward_hook(note(name)) for name, layer in layers.items()]
        flags = [(module, module.training) for module in self.model.modules()]
        devices = list({tensor.device for tensor in tensors(self.example) if tensor.is_cuda})
        try:
            with mode(self.model, training=False), torch.random.fork_rng(devices=devices), torch.no_grad():
                prediction = self.output(call(self.model, map_tensors(Tensor.clone, self.example)))
        finally:
            for handle in handles:
                handle.remove()
            for module, training in flags:
                module.train(training)
        for name, (output, version, same) in outputs.items():
            is_it = output.data_ptr() == prediction.data_ptr() and output.numel() == prediction.numel()
            if is_it and same and version == version_of(prediction):
                return name
        others = f" (there are {', '.join(layers)})" if layers else ""
        raise ValueError(
            f"{type(self.model).__name__} returns {describe(prediction)}, which is the output of no nn.Linear of "
            f"{self.size} outputs{others}: pass layer= with the name of the output layer to read out through, or use "
            "another head"
        )
