"""Prediction heads at a border: modules that map a BorderInput to logits (B, n), or (B, T, n) per token.

`linear`, `normalised` and `mlp` read the channel statistics. The others read the feature map: `conv` and `residual`
through two strided stages and the mean over space, `pooled` at half its resolution, `patches` its quarters one by one,
`depthwise` through three stages of depth-wise separable convolutions. A deeper head approximates p(y | z_k) better, at
a higher cost. `evidence` has no parameters: the messages themselves classify, since log q(y | x) is the logarithm of
the integral of alpha_k(z) beta_k(z; y).
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise, product

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from blocklocal.families import Family, Gaussian
from blocklocal.messages import BorderInput, BorderSpec, spatial_mean
from blocklocal.operations import operations

Head = Callable[[BorderSpec], nn.Module]


class LinearHead(nn.Module):
    """One linear layer on the statistics (as in Nokland and Eidnes, 2019)."""

    def __init__(self, spec: BorderSpec) -> None:
        super().__init__()
        self.linear = nn.Linear(spec.statistics, spec.targets.size)

    def forward(self, border_input: BorderInput) -> Tensor:
        return self.linear(border_input.statistics)


class NormalisedHead(nn.Module):
    """Layer normalisation of the statistics, then one linear layer: the read-out of a transformer."""

    def __init__(self, spec: BorderSpec) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.LayerNorm(spec.statistics), nn.Linear(spec.statistics, spec.targets.size))

    def forward(self, border_input: BorderInput) -> Tensor:
        return self.layers(border_input.statistics)


class MLPHead(nn.Module):
    """Two linear layers on the statistics, with as many hidden units as statistics, at least 64."""

    def __init__(self, spec: BorderSpec) -> None:
        super().__init__()
        width = max(spec.statistics, 64)
        self.layers = nn.Sequential(nn.Linear(spec.statistics, width), nn.ReLU(), nn.Linear(width, spec.targets.size))

    def forward(self, border_input: BorderInput) -> Tensor:
        return self.layers(border_input.statistics)


class MapHead(nn.Module):
    """Features of the map, their mean over space, one linear layer."""

    features: nn.Module
    linear: nn.Linear

    def forward(self, border_input: BorderInput) -> Tensor:
        return self.linear(self.features(border_input.map).mean((2, 3)))


class ConvHead(MapHead):
    """Two strided 3x3 convolutions with batch normalisation, the mean over space, one linear layer."""

    def __init__(self, spec: BorderSpec) -> None:
        super().__init__()
        _require_map(spec, head="conv")
        width = min(spec.channels, 128)
        self.features = nn.Sequential(_conv(spec.channels, width, stride=2), _conv(width, width, stride=2))
        self.linear = nn.Linear(width, spec.targets.size)


class ResidualHead(MapHead):
    """Two strided residual units that double the channels, up to 128 and 256, the mean over space, one linear layer."""

    name = "residual"

    def __init__(self, spec: BorderSpec) -> None:
        super().__init__()
        _require_map(spec, head=self.name)
        inner, outer = min(2 * spec.channels, 128), min(4 * spec.channels, 256)
        self.features = nn.Sequential(
            ResidualUnit(spec.channels, inner, stride=2), ResidualUnit(inner, outer, stride=2)
        )
        self.linear = nn.Linear(outer, spec.targets.size)


class PooledResidualHead(ResidualHead):
    """The residual head on the map averaged over squares of 2x2 pixels, at a quarter of its cost."""

    name = "pooled"

    def forward(self, border_input: BorderInput) -> Tensor:
        return self.linear(self.features(halved(border_input.map)).mean((2, 3)))


class PatchHead(ResidualHead):
    """The residual head on each quarter of the map, and the mean of its four predictions (HPFF; Su et al., 2024)."""

    name = "patches"

    def forward(self, border_input: BorderInput) -> Tensor:
        halves = [[slice(size - size // 2), slice(size // 2, None)] for size in border_input.map.shape[2:]]
        quarters = torch.cat([border_input.map[:, :, rows, columns] for rows, columns in product(*halves)])
        return self.linear(self.features(quarters).mean((2, 3))).unflatten(0, (4, -1)).mean(0)


class DepthwiseHead(MapHead):
    """Three strided depth-wise separable convolutions that double the channels, the mean over space, one linear layer
    (as in SEDONA; Pyeon et al., 2021)."""

    def __init__(self, spec: BorderSpec) -> None:
        super().__init__()
        _require_map(spec, head="depthwise")
        widths = [spec.channels * 2**k for k in range(4)]
        self.features = nn.Sequential(*(_separable(inputs, outputs) for inputs, outputs in pairwise(widths)))
        self.linear = nn.Linear(widths[-1], spec.targets.size)


class ResidualUnit(nn.Module):
    """relu(conv(conv(h)) + projection of h), the basic unit of residual networks."""

    def __init__(self, inputs: int, outputs: int, *, stride: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            _conv(inputs, outputs, stride=stride),
            nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs))
        self.stride = stride

    def forward(self, h: Tensor) -> Tensor:
        h, coarse = Fork.apply(h, self.stride)
        return torch.relu(self.branch(h) + self.shortcut(coarse))


class StridedConv2d(nn.Conv2d):
    """`Conv2d` with strides no larger than the map, beyond which they change nothing.

    In bfloat16 on a CPU, the weight gradient of a convolution whose stride is larger than the width of the map is
    memory that was never written (torch 2.13.0 with its oneDNN, on processors with AVX512-BF16).
    """

    def forward(self, input: Tensor) -> Tensor:
        strides = [min(stride, size) for stride, size in zip(self.stride, input.shape[2:], strict=True)]
        return F.conv2d(input, self.weight, self.bias, strides, self.padding)


def halved(h: Tensor) -> Tensor:
    """The mean of h (B, C, H, W) over squares of 2x2 pixels; at an odd edge over the pixels left."""
    if h.is_cpu and h.is_contiguous() and h.shape[2] % 2 == h.shape[3] % 2 == 0 and not torch.compiler.is_compiling():
        return Halving.apply(h)
    return F.avg_pool2d(h, 2, ceil_mode=True, count_include_pad=False)


class Halving(torch.autograd.Function):
    """The same by slices, rows first: a quarter of PyTorch's time on a CPU with channels outermost."""

    @staticmethod
    def forward(ctx, h: Tensor) -> Tensor:
        rows = h[:, :, ::2] + h[:, :, 1::2]
        return (rows[..., ::2] + rows[..., 1::2]).mul_(0.25)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        quarter, (b, c, height, width) = gradient * 0.25, gradient.shape
        rows = quarter.new_empty(b, c, height, 2 * width)
        rows[..., ::2] = rows[..., 1::2] = quarter
        whole = quarter.new_empty(b, c, 2 * height, 2 * width)
        whole[:, :, ::2] = whole[:, :, 1::2] = rows
        return whole


class Fork(torch.autograd.Function):
    """(h, every `stride`-th pixel of h), both views; what reads the first must begin with a convolution.

    The second gradient is added in place to the first, which the convolution has just allocated: one map is alive
    besides the block's activations, where autograd would need two and their sum.
    """

    @staticmethod
    def forward(ctx, h: Tensor, stride: int) -> tuple[Tensor, Tensor]:
        ctx.stride = stride
        return h.view_as(h), h[:, :, ::stride, ::stride]

    @staticmethod
    def backward(ctx, gradient: Tensor, coarse: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        gradient[:, :, :: ctx.stride, :: ctx.stride] += coarse
        return gradient, None


class EvidenceHead(nn.Module):
    """Scores each class by the evidence of its feedback message; for the Gaussian -|a - b_y|^2 / (4 s2)."""

    reads_feedback = True

    def __init__(self, spec: BorderSpec, *, family: Family = Gaussian()) -> None:  # noqa: B008 (frozen settings)
        super().__init__()
        if not spec.targets.labels:
            raise ValueError('head="evidence" compares classes: it needs labels (classes=), not dense targets')
        self.family, self.classes = family, spec.targets.size

    def forward(self, border_input: BorderInput) -> Tensor:
        assert border_input.feedback is not None
        classes = torch.arange(self.classes, device=border_input.alpha.device)
        beta = border_input.feedback(classes).detach().to(border_input.alpha.dtype)
        return self.family.evidence_matrix(border_input.alpha, beta)


def default_head(spec: BorderSpec) -> Head:
    return PooledResidualHead if spec.is_map else NormalisedHead


def affordable_head(spec: BorderSpec, *, budget: float) -> Head:
    """The best head that takes at most `budget` times the operations of the block before it, or else the cheapest.

    Two heads are not considered: residual units on the whole map take four times the operations of "pooled", and
    depth-wise convolutions are slow on a CPU, despite their few operations.
    """
    assert spec.operations is not None
    for head in (PooledResidualHead, ConvHead) if spec.is_map else ():
        if _operations(head, spec) <= budget * spec.operations:
            return head
    return NormalisedHead


def _operations(head: Head, spec: BorderSpec) -> float:
    with torch.device("meta"):  # where nothing is computed and no random number is drawn
        module, h = head(spec).eval(), torch.empty(1, *spec.shape)
    return operations(lambda h: module(BorderInput(h, spec=spec, statistic=spatial_mean, feedback=None)), h)


HEADS: dict[str, Head] = {
    "linear": LinearHead,
    "normalised": NormalisedHead,
    "mlp": MLPHead,
    "conv": ConvHead,
    "residual": ResidualHead,
    "pooled": PooledResidualHead,
    "patches": PatchHead,
    "depthwise": DepthwiseHead,
    "evidence": EvidenceHead,
}


def _conv(inputs: int, outputs: int, *, stride: int) -> nn.Sequential:
    convolution = StridedConv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU())


def _separable(inputs: int, outputs: int) -> nn.Sequential:
    """A strided 3x3 convolution of each channel by itself, then a 1x1 convolution over all channels."""
    return nn.Sequential(
        nn.Conv2d(inputs, inputs, 3, stride=2, padding=1, groups=inputs, bias=False),
        nn.BatchNorm2d(inputs),
        nn.ReLU(),
        nn.Conv2d(inputs, outputs, 1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    )


def _require_map(spec: BorderSpec, *, head: str) -> None:
    if not spec.is_map:
        raise ValueError(
            f'head="{head}" needs feature maps (B, C, H, W), but a sample at this border has shape {spec.shape} '
            f'({spec.layout}): use "normalised", "mlp" or "linear"'
        )
