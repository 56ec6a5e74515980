"""The layers of a model that get feedback weights, and the models that cannot be trained with them."""

from __future__ import annotations

import torch
from torch import nn

Layer = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d
Transposed = nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d
Uncovered = nn.MultiheadAttention | nn.RNNBase | nn.RNNCellBase | nn.Bilinear | Transposed | torch.jit.ScriptModule


def find_layers(model: nn.Module) -> dict[str, Layer]:
    """Every Linear and convolution layer of the model by its qualified name.

    ValueError: there is none, or errors would pass through true weights despite the rule, or through undefined ones:
    another module with weights, padding other than zeros, one weight in two layers.
    """
    layers: dict[str, Layer] = {}
    for name, module in model.named_modules():
        if isinstance(module, Uncovered):
            raise ValueError(
                f"{name or 'the model'} is a {type(module).__name__}, which would send errors back over its true "
                "weights: feedback alignment covers Linear and Conv1d/2d/3d; build the module from these"
            )
        if isinstance(module, Layer):
            _check(module, name=name or "the model")
            layers[name] = module
    if not layers:
        raise ValueError(f"{type(model).__name__} has no Linear and no Conv1d/2d/3d: there is nothing to align")
    owners: dict[int, str] = {}
    for name, layer in layers.items():
        if (owner := owners.setdefault(id(layer.weight), name)) != name:
            raise ValueError(f"{owner} and {name} share one weight, but would have two feedback weights: untie them")
    return layers


def _check(layer: Layer, *, name: str) -> None:
    if nn.parameter.is_lazy(layer.weight):
        raise ValueError(f"{name} is a lazy layer without weights yet: run the model on one batch first")
    if not isinstance(layer, nn.Linear) and layer.padding_mode != "zeros":
        raise ValueError(f"{name} has padding_mode={layer.padding_mode!r}: feedback alignment allows 'zeros' only")
    if "forward" in vars(layer):
        raise ValueError(f"{name} has its forward replaced, perhaps by another alignment: call that one's remove()")
