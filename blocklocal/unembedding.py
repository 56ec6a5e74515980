"""A head that predicts through the model's own output layer, which a language model calls its unembedding.

The features of a transformer are sums of what its layers write, so those at a border can be read with the matrix that
reads the last ones (the logit lens; nostalgebraist, 2020), here after a norm and at a temperature that are learnt. A
border then has 2 D + 1 parameters of its own instead of the n D of a private read-out.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from blocklocal.arguments import require, require_whole
from blocklocal.messages import BorderInput, BorderSpec
from blocklocal.refreshed_head import RefreshedHead


@dataclass(frozen=True)
class Unembedding:
    """A head for `Predictive(head=...)`: a read-only copy of the model's output layer, after a norm of its own.

        logits = (W LayerNorm(a) + b) / exp(t),

    for the statistics a of the border, D for each sample or token. W (n, D) and b, if there is one, are those of the
    model's last nn.Linear; no gradient reaches it from a border. The layer normalisation and the log-temperature t are
    the border's own, 2 D + 1 parameters. refresh: number of training steps after which the copy takes the layer's
    current weights; in between it is frozen. layer: the name of the layer, where the model does not return the output
    of an nn.Linear as it is, or another one is wanted.

    A `Pipeline` and `BlockLocal.offload` refuse it, since the last block is elsewhere.

    ValueError, when the learner is built: no such layer, or one that does not take D features.

    >>> import blocklocal as bll
    >>> model = nn.Sequential(nn.Embedding(50, 16), nn.Linear(16, 16), nn.Linear(16, 50))
    >>> learner = bll.BlockLocal(model, at=["0"], classes=50, example=torch.zeros(2, 8, dtype=torch.int64),
    ...     loss=bll.Predictive(bll.Unembedding(refresh=20)))
    >>> sum(parameter.numel() for parameter in learner.borders.parameters())
    33
    """

    refresh: int = 100
    layer: str | None = None

    def __post_init__(self) -> None:
        require_whole(self.refresh, name="refresh", least=1)
        require(self.layer, str | None, name="layer", needed="pass the name of the model's output layer")

    def __call__(self, spec: BorderSpec) -> nn.Module:
        if spec.output_layer is None:
            raise ValueError("Unembedding() copies the output layer of a model, and this border is made without one")
        name, layer = spec.output_layer.find(self.layer)
        if layer.in_features != spec.statistics:
            raise ValueError(
                f"Unembedding() reads {layer.in_features} features, the inputs of {name!r}, but a border has "
                f"{spec.statistics} statistics: cut where the model is as wide as before its output layer, or use "
                "another head"
            )
        return UnembeddingHead(name, layer, refresh=self.refresh)


class UnembeddingHead(RefreshedHead):
    """The copy of the layer of this name, with the border's norm and log-temperature."""

    settings = "Unembedding()"
    weight: Tensor
    bias: Tensor | None

    def __init__(self, name: str, layer: nn.Linear, *, refresh: int) -> None:
        super().__init__(refresh=refresh)
        self.layer = name
        self.norm = nn.LayerNorm(layer.in_features)
        self.log_temperature = nn.Parameter(torch.zeros(()))
        self.register_buffer("weight", layer.weight.detach().clone())
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach().clone())

    def forward(self, border_input: BorderInput) -> Tensor:
        scale = (-self.log_temperature).exp()  # of the D features, not of the n logits
        bias = None if self.bias is None else self.bias * scale
        return F.linear(self.norm(border_input.statistics) * scale, self.weight, bias)

    def take(self, model: nn.Module) -> None:
        """RuntimeError: the layer has been replaced by one that does not fit."""
        layer = dict(model.named_modules()).get(self.layer)
        now = (layer.weight, layer.bias) if isinstance(layer, nn.Linear) else (None, None)
        for own, weight in zip((self.weight, self.bias), now, strict=True):
            if own is not None and weight is not None and own.shape == weight.shape:
                own.copy_(weight)
            elif own is not None or weight is not None:
                raise RuntimeError(f"the output layer {self.layer!r} was replaced by another kind: build a new learner")


def unembeddings(module: nn.Module) -> list[UnembeddingHead]:
    """The heads of a border, or of several, that predict through the model's output layer."""
    return [head for head in module.modules() if isinstance(head, UnembeddingHead)]
