"""What a chain's blocks give on an example, and where its borders therefore stand."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from blocklocal.arguments import passes
from blocklocal.feedback import Targets
from blocklocal.graph import mode
from blocklocal.messages import Criterion, Site


@torch.no_grad()
def survey(blocks: nn.ModuleList, example: Tensor | None, *, size: int) -> tuple[list[Tensor], list[bool]]:
    """The blocks' outputs on `example` in evaluation mode, and which blocks write into their input.

    Nothing for a chain of one block, which has no border. ValueError: no example, a block that gives no features, a
    prediction of another size.
    """
    if len(blocks) == 1:
        return [], [False]
    if example is None:
        raise ValueError("pass example=, a batch of inputs: the borders take their shapes from it")
    outputs: list[Tensor] = []
    writes_input: list[bool] = []
    h = example
    with mode(blocks, training=False):
        for k, block in enumerate(blocks):
            before = h._version
            with passes(h, name="example" if k == 0 else f"what block {k - 1} gives on example=", through=f"block {k}"):
                output = block(h if k else h.clone())
            writes_input.append(k > 0 and (h._version != before or _drops_in_place(block)))
            if not isinstance(output, Tensor) or output.dim() < 2:
                raise ValueError(f"block {k} gives {_describe(output)}: a block gives one tensor (B, ...) of features")
            outputs.append(output)
            h = output
    if h.shape[-1] != size:
        raise ValueError(
            f"the model gives {_describe(h)}: its last dimension must be {size}, the number of classes or outputs"
        )
    return outputs, writes_input


def site_of(h: Tensor, *, prediction: Tensor, targets: Targets, criterion: Criterion) -> Site:
    """The site of a border at h, in a model that gives this prediction: per token where it has three dimensions."""
    tokens = prediction.dim() > 2
    if tokens and h.shape[:-1] != prediction.shape[:-1]:
        raise ValueError(
            f"a block gives {_describe(h)}, and the model predicts per token, {_describe(prediction)}: "
            "cut where the features are one vector per token"
        )
    return Site(tuple(h.shape[1:]), targets=targets, tokens=tokens, criterion=criterion)


def _drops_in_place(block: nn.Module) -> bool:
    """Whether dropout, which evaluation mode does not show, may write into the block's input."""
    return any(isinstance(module, _DropoutNd) and module.inplace for module in block.modules())


def _describe(value: object) -> str:
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
