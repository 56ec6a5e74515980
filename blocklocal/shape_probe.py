"""What a chain's blocks return for an example, and the specs of its borders that follow."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from blocklocal.arguments import passes
from blocklocal.autograd_graph import parameters, reachable
from blocklocal.feedback import Targets
from blocklocal.graph import few, mode
from blocklocal.internals import UnsupportedTorch, version_of
from blocklocal.layout import Layout, Reading, find_layouts
from blocklocal.messages import BorderSpec, Criterion
from blocklocal.operations import operations
from blocklocal.side_inputs import SideInputs
from blocklocal.values import Inputs, call, map_tensors, one_more, prediction_of, tensors

DIMENSIONS = {"vector": range(2, 3), "tokens": range(3, 9), "signal": range(3, 4), "map": range(4, 9)}
DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)


@dataclass(frozen=True)
class ShapeProbe:
    """What the blocks of a chain do with an example.

    layouts: those found at the borders. operations: of each block for one sample, None if they were not counted.
    """

    outputs: list[Tensor]
    layouts: list[Layout | None]
    writes_input: list[bool]
    operations: list[float | None]


@torch.no_grad()
def probe_shapes(
    model: nn.Module,
    blocks: nn.ModuleList,
    example: Inputs | None,
    *,
    inputs: SideInputs,
    size: int,
    count: bool = False,
) -> ShapeProbe:
    """Run the blocks cut from `model` on `example` in evaluation mode.

    A chain of one block, which has no border, is not run. ValueError: no example, a block that returns no features, a
    prediction of the wrong size, one that differs from the model's, or one with gradients for other parameters.
    """
    if len(blocks) == 1:
        return ShapeProbe([], [], [False], [None])
    if example is None:
        raise ValueError("pass example=, a batch of inputs: the borders take their shapes from it")
    check_example(model, example)
    outputs: list[Tensor] = []
    readings: list[Reading] = []
    writes_input: list[bool] = []
    counts: list[float | None] = [None] * len(blocks)
    given = map_tensors(Tensor.clone, example)
    first = h = next(tensors(given))
    devices = list({tensor.device for tensor in tensors(example) if tensor.is_cuda})
    with mode(blocks, training=False), torch.random.fork_rng(devices=devices):
        for k, block in enumerate(blocks):
            before = version_of(h)
            name = "example" if k == 0 else f"the output of block {k - 1} for example="
            args, kwargs = inputs.call(k, h, given)
            with passes(h, name=name, through=f"block {k}"), Reading(h) as reading, torch.enable_grad():
                output = block(*args, **kwargs)
            if k == len(blocks) - 1 and not isinstance(output, Tensor):
                output = prediction_of(output)
            writes_input.append(k > 0 and (version_of(h) != before or drops_in_place(block)))
            if not isinstance(output, Tensor) or output.dim() < 2:
                raise ValueError(f"block {k} returns {_describe(output)}: a block must return one tensor (B, ...)")
            _require_own_gradient(output, blocks=blocks, k=k)
            h = output.detach()
            outputs.append(h)
            readings.append(reading)
    check_prediction(h, size=size)
    traced = not set(blocks) <= set(model.modules())
    if traced:
        with mode(model, training=False), torch.random.fork_rng(devices=devices), Reading(first):
            _compare(h, prediction_of(call(model, map_tensors(Tensor.clone, example))))
        _compare_gradients(model, blocks, few(model, example), inputs=inputs, devices=devices)
    require_batch_first(outputs)
    if any(h.dim() > 2 and h.shape[1] == len(h) for h in outputs):  # then one batch size does not tell
        longer = _run(blocks, one_more(example, batch=len(first)), inputs=inputs, devices=devices)
        require_batch_first(longer)
    if count:
        given = map_tensors(Tensor.clone, example)
        with mode(blocks, training=False), torch.random.fork_rng(devices=devices), suppress(UnsupportedTorch):
            for k, (block, h) in enumerate(zip(blocks, [first, *outputs], strict=False)):
                args, kwargs = inputs.call(k, h.clone(), given)
                counts[k] = operations(lambda _, block=block, args=args, kwargs=kwargs: block(*args, **kwargs), h)
    return ShapeProbe(outputs, find_layouts(outputs, readings), writes_input, counts)


def _run(blocks: nn.ModuleList, x: Inputs, *, inputs: SideInputs, devices: list[torch.device]) -> list[Tensor]:
    """What the blocks return for x, one after the other."""
    given, h, outputs = map_tensors(Tensor.clone, x), None, []
    with mode(blocks, training=False), torch.random.fork_rng(devices=devices):
        for k, block in enumerate(blocks):
            args, kwargs = inputs.call(k, None if h is None else h.clone(), given)
            h = block(*args, **kwargs)
            outputs.append(h)
    return outputs


def _compare_gradients(
    model: nn.Module, blocks: nn.ModuleList, example: Inputs, *, inputs: SideInputs, devices: list[torch.device]
) -> None:
    """ValueError: other parameters get a gradient in the blocks than in the model."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    with torch.enable_grad(), mode(model, training=False), torch.random.fork_rng(devices=devices):
        prediction = prediction_of(call(model, map_tensors(Tensor.clone, example)))
    with torch.enable_grad():
        *_, ours = _run(blocks, example, inputs=inputs, devices=devices)
    learnt, expected = (set(parameters(reachable(h.grad_fn), names=names)) for h in (ours, prediction))
    if learnt != expected:
        name = min(learnt ^ expected)
        which = "but not in the model" if name in learnt else "in the model, but not in its blocks"
        raise ValueError(
            f"parameter {name!r} gets a gradient {'in the blocks, ' * (name in learnt)}{which}: a trace loses part of "
            "its forward pass; cut outside it, or pass the blocks as a list of modules"
        )


def check_example(model: nn.Module, example: Inputs) -> None:
    """ValueError: only one of the two is on the meta device."""
    meta, first = any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers())), next(tensors(example))
    if meta != first.is_meta:
        raise ValueError(
            f"example= is on the device {first.device}, but the model {'is' if meta else 'is not'} on the meta "
            "device: put both on it, or neither"
        )


def check_prediction(prediction: object, *, size: int) -> None:
    """ValueError: a prediction with the wrong number of classes or outputs, or without a batch."""
    if isinstance(prediction, Tensor) and prediction.shape == (size,) and size > 1:
        raise ValueError(f"the model returns {_describe(prediction)} for x: a batch is needed, such as x.unsqueeze(0)")
    if not isinstance(prediction, Tensor) or prediction.dim() < 2 or prediction.shape[-1] != size:
        one = isinstance(prediction, Tensor) and prediction.dim() == 1 and size == 1
        raise ValueError(
            f"the model returns {_describe(prediction)}: its last dimension must be {size}, the number of classes or "
            f"outputs{'; let it return one column, as prediction.unsqueeze(-1)' * one}"
        )


def border_spec(
    h: Tensor, *, layout: Layout | None, prediction: Tensor, targets: Targets, criterion: Criterion
) -> BorderSpec:
    """The spec of a border at h in a model with this prediction, which is per token if it has three dimensions."""
    if h.dim() == 2:
        layout = "vector"
    if layout is None:
        raise ValueError(
            f"a block returns {_describe(h)}, and no layer at the border tells which dimension holds the channels: "
            'pass layout="tokens" if it is the last, "signal" (B, C, L) or "map" (B, C, H, W) if it is the second'
        )
    if h.dim() not in DIMENSIONS[layout]:
        raise ValueError(f"a block returns {_describe(h)}, which does not fit layout={layout!r}: pass another layout=")
    spec = BorderSpec(
        tuple(h.shape[1:]), layout=layout, targets=targets, tokens=prediction.dim() > 2, criterion=criterion
    )
    rows = h.movedim(1, -1) if spec.channels_first else h
    if spec.tokens and rows.shape[:-1] != prediction.shape[:-1]:
        raise ValueError(
            f"a block returns {_describe(h)}, but the model predicts per token, {_describe(prediction)}: "
            "cut where the features are one vector per token"
        )
    return spec


def _require_own_gradient(output: Tensor, *, blocks: nn.ModuleList, k: int) -> None:
    """ValueError: the output of block k has a gradient for parameters of an earlier block."""
    earlier = ((j, name, p) for j, block in enumerate(blocks[:k]) for name, p in block.named_parameters())
    foreign: dict[object, tuple[int, str]] = {p: (j, name) for j, name, p in earlier}
    waiting, known = [output.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in known:
            continue
        known.add(node)
        waiting += [following for following, _ in node.next_functions]
        if (variable := getattr(node, "variable", None)) in foreign:
            j, name = foreign[variable]
            raise ValueError(
                f"block {k} reads a value that depends on parameter {name!r} of block {j}, not through the features: "
                "only the output of a block may cross a border; keep such values inside a block, or detach them"
            )


def require_batch_first(outputs: list[Tensor]) -> None:
    """ValueError: features, of all blocks, whose first dimension is not the batch's."""
    for k, h in enumerate(outputs):
        if len(h) != len(outputs[-1]):
            raise ValueError(
                f"block {k} returns {_describe(h)} and the model {_describe(outputs[-1])}: the first dimension of "
                "features must be the batch; cut elsewhere, or put the batch first"
            )


def _compare(chain: Tensor, prediction: object) -> None:
    """ValueError: the prediction of the blocks differs from that of the model they were cut from."""
    if not isinstance(prediction, Tensor) or (prediction.shape, prediction.dtype) != (chain.shape, chain.dtype):
        raise ValueError(f"the blocks return {_describe(chain)} for example=, but the model {_describe(prediction)}")
    if chain.is_meta:
        return
    largest = prediction.abs().nan_to_num(posinf=0.0).max().item()
    rounding = largest * torch.finfo(chain.dtype).eps ** 0.75
    if not torch.allclose(chain, prediction, rtol=0.0, atol=rounding, equal_nan=True):
        raise ValueError(
            "the blocks' prediction for example= differs from the model's by up to "
            f"{(chain - prediction).abs().max().item():.2g}: a trace loses part of its forward pass; cut outside it, "
            "or pass the blocks as a list of modules"
        )


def drops_in_place(block: nn.Module) -> bool:
    """Whether dropout, which evaluation mode hides, may write into the block's input."""
    return any(isinstance(module, DROPOUTS) and module.inplace for module in block.modules())


def _describe(value: object) -> str:
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
