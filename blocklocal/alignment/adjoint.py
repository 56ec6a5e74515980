"""The autograd functions of the rules. Forward, each is the identity or zero; the rule is in what it sends back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn import grad as convolution

from .layers import Layer


def connect(x: Tensor, y: Tensor, *, layer: Layer, feedback: Tensor) -> Tensor:
    """Return y = layer(x.detach()), whose gradient goes to x as if `feedback` were the layer's weight."""
    if isinstance(layer, nn.Linear):
        return LinearAdjoint.apply(x, y, feedback)
    padding = layer.padding
    if isinstance(padding, str):
        reach = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
        total = reach if padding == "same" else [0] * len(reach)
        padding = [t // 2 for t in total]
        if any(t % 2 for t in total):  # an odd total has one more at the end, unknown to the adjoint
            x = F.pad(x, [side for t in reversed(total) for side in (0, t % 2)])
    return ConvolutionAdjoint.apply(x, y, feedback, layer.stride, padding, layer.dilation, layer.groups)


class LinearAdjoint(torch.autograd.Function):
    """y forward; backward δ to y and δB to x."""

    @staticmethod
    def forward(x: Tensor, y: Tensor, feedback: Tensor) -> Tensor:
        return y.clone()  # an alias of y would forbid in-place activations

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        x, _, feedback = inputs
        ctx.save_for_backward(feedback)
        ctx.dtype = x.dtype

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (delta,), (feedback,) = grad_outputs, ctx.saved_tensors
        return (delta @ feedback.to(delta.dtype)).to(ctx.dtype), delta, None


class ConvolutionAdjoint(torch.autograd.Function):
    """y forward; backward δ to y and the transposed convolution of δ with B to x. Unbatched inputs are allowed."""

    @staticmethod
    def forward(
        x: Tensor,
        y: Tensor,
        feedback: Tensor,
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        groups: int,
    ) -> Tensor:
        return y.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        x, _, feedback, *ctx.geometry = inputs
        ctx.save_for_backward(feedback)
        ctx.shape, ctx.dtype = x.shape, x.dtype

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (delta,), (feedback,) = grad_outputs, ctx.saved_tensors
        batched = delta.dim() == feedback.dim()
        error, shape = (delta, ctx.shape) if batched else (delta.unsqueeze(0), (1, *ctx.shape))
        adjoint = (convolution.conv1d_input, convolution.conv2d_input, convolution.conv3d_input)[feedback.dim() - 3]
        to_input = adjoint(shape, feedback.to(delta.dtype), error, *ctx.geometry)
        return to_input.reshape(ctx.shape).to(ctx.dtype), delta, None, None, None, None, None


class Tap(torch.autograd.Function):
    """Zeros (batch, n) forward; backward a signal s (batch, n) becomes sB at x, with B of shape (n, *features of x)."""

    @staticmethod
    def forward(x: Tensor, feedback: Tensor) -> Tensor:
        return feedback.new_zeros(x.shape[0], feedback.shape[0])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        x, feedback = inputs
        ctx.save_for_backward(feedback)
        ctx.shape, ctx.dtype = x.shape, x.dtype

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (signal,), (feedback,) = grad_outputs, ctx.saved_tensors
        return (signal @ feedback.flatten(1)).reshape(ctx.shape).to(ctx.dtype), None


class Broadcast(torch.autograd.Function):
    """The prediction forward; backward every tap gets the prediction's gradient, or `signal` if that is given."""

    @staticmethod
    def forward(prediction: Tensor, signal: Tensor | None, *taps: Tensor) -> Tensor:
        return prediction.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        _, signal, *taps = inputs
        ctx.save_for_backward(signal)
        ctx.dtypes = [tap.dtype for tap in taps]

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (error,), (signal,) = grad_outputs, ctx.saved_tensors
        sent = error if signal is None else signal
        return error, None, *(sent.to(dtype) for dtype in ctx.dtypes)
