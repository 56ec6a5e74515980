"""What a border gets for one batch: the block's output, its channel statistics and the feedback they meet.

A statistic reduces positions, h (B, C, P) -> (B, C), or to `per_channel` numbers for each channel: feature maps
(B, C, H, W) have P = H W positions, signals (B, C, L) P = L, token sequences (B, T, D) P = T, vectors (B, D) one. If
the model predicts per token, every token has its own statistics and alpha is (B, T, D).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from blocklocal.arguments import describe, require_tensor, require_whole
from blocklocal.feedback import Targets, at_least_single
from blocklocal.layout import Layout
from blocklocal.output_layer import OutputLayer

Statistic = Callable[[Tensor], Tensor]
Criterion = Callable[[Tensor, Tensor], Tensor]


def spatial_mean(positions: Tensor) -> Tensor:
    """Mean over positions: (B, C, P) -> (B, C).

    Computed as a sum and a division, since the gradient of torch.mean is written out for every position.

    >>> spatial_mean(torch.tensor([[[1.0, 3.0], [2.0, 2.0]]]))
    tensor([[2., 2.]])
    """
    _require_positions(positions)
    total = positions.sum(2, dtype=at_least_single(positions.dtype))
    return (total / positions.shape[2]).to(positions.dtype)


def spatial_max(positions: Tensor) -> Tensor:
    """Maximum over positions: (B, C, P) -> (B, C).

    >>> spatial_max(torch.tensor([[[1.0, 3.0], [2.0, 2.0]]]))
    tensor([[3., 2.]])
    """
    _require_positions(positions)
    return positions.amax(2)


def spatial_std(positions: Tensor) -> Tensor:
    """Standard deviation over positions: (B, C, P) -> (B, C). Zero, with zero gradient, if there is one position.

    >>> spatial_std(torch.tensor([[[1.0, 3.0], [2.0, 2.0]]]))
    tensor([[1., 0.]])
    """
    _require_positions(positions)
    variance = positions.var(2, correction=0)
    return torch.where(variance > 0, variance, torch.ones_like(variance)).sqrt() * (variance > 0)


@dataclass(frozen=True)
class SpatialMoments:
    """Mean and standard deviation over positions: (B, C, P) -> (B, 2 C), the means of all channels first.

    >>> SpatialMoments()(torch.tensor([[[1.0, 3.0], [2.0, 2.0]]]))
    tensor([[2., 2., 1., 0.]])
    """

    per_channel: ClassVar[int] = 2

    def __call__(self, positions: Tensor) -> Tensor:
        return torch.cat([spatial_mean(positions), spatial_std(positions)], 1)


@dataclass(frozen=True)
class SpatialGrid:
    """Means over the cells of a `size` x `size` grid, which keep coarse positions: (B, C, H, W) -> (B, C size^2).

    Only for feature maps of at least `size` pixels per side.

    >>> SpatialGrid(2)(torch.zeros(8, 16, 7, 7)).shape
    torch.Size([8, 64])
    """

    reads_map: ClassVar[bool] = True
    size: int = 2

    def __post_init__(self) -> None:
        require_whole(self.size, name="size", least=1)

    @property
    def per_channel(self) -> int:
        return self.size**2

    def __call__(self, map: Tensor) -> Tensor:
        if map.dim() != 4 or min(map.shape[2:]) < self.size:
            raise ValueError(
                f"map is {describe(map)}: it must be (B, C, H, W) with at least {self.size} pixels per side; pass "
                "another statistic="
            )
        return F.adaptive_avg_pool2d(map, self.size).flatten(1)


def memory_order(h: Tensor) -> tuple[int, ...]:
    """The dimensions of h from the outermost to the innermost in memory."""
    return tuple(sorted(range(h.dim()), key=lambda d: (-h.stride(d), d)))


def dense(h: Tensor) -> Tensor:
    """h itself, or a contiguous copy if it does not fill its memory (a slice, an expanded tensor)."""
    return h if h.permute(memory_order(h)).is_contiguous() else h.contiguous()


def _require_positions(positions: Tensor) -> None:
    require_tensor(positions, name="positions")
    if positions.dim() != 3:
        raise ValueError(f"positions is {describe(positions)}: it must have three dimensions (B, C, P)")


def add_belief(belief: Tensor | None, evidence: Tensor) -> Tensor:
    """Add the natural parameters of categorical messages (Eq. 2), at least in single precision. belief may be None."""
    if belief is None:
        return evidence
    return belief + evidence.to(at_least_single(evidence.dtype))


@dataclass(frozen=True)
class BorderSpec:
    """What a border is built for: the shape and layout of one sample of h, and what to predict there.

    shape: (D,) for a vector, (T, D) or (H, W, D) for tokens, (C, L) for a signal, (C, H, W) for a map. tokens: whether
    there is one prediction per token instead of one per sample. depth: k / (K - 1) at border k of a chain of K blocks.
    operations: of a forward pass of the block before it for one sample; None if they have not been counted. following:
    the block after it, which a head may copy; None during the search for cuts. output_layer: finds the layer that
    gives the model's prediction. per_channel: the number of statistics per channel.

    >>> from blocklocal import BlockLocal
    >>> learner = BlockLocal([nn.Linear(8, 16), nn.Linear(16, 3)], classes=3, example=torch.randn(2, 8))
    >>> learner.borders[0].spec.shape
    (16,)
    """

    shape: tuple[int, ...]
    layout: Layout
    targets: Targets
    tokens: bool
    criterion: Criterion
    depth: float = 0.0
    operations: float | None = None
    following: nn.Module | None = field(default=None, repr=False, compare=False)
    output_layer: OutputLayer | None = field(default=None, repr=False, compare=False)
    per_channel: int = 1

    @property
    def channels_first(self) -> bool:
        return self.layout in ("signal", "map")

    @property
    def channels(self) -> int:
        return self.shape[0 if self.channels_first else -1]

    @property
    def reduces(self) -> bool:
        """Whether a statistic reduces positions; a vector, or a token with its own prediction, is its own statistic."""
        return not self.tokens and self.layout != "vector"

    @property
    def statistics(self) -> int:
        """The number of channel statistics of a sample, or of a token."""
        return self.channels * self.per_channel if self.reduces else self.channels

    @property
    def prediction(self) -> tuple[int, ...]:
        """The shape of the prediction for one sample."""
        positions = self.shape[1:] if self.channels_first else self.shape[:-1]
        return (*(positions if self.tokens else ()), self.targets.size)

    @property
    def is_map(self) -> bool:
        """Whether a BorderInput has a `map`."""
        return len(self.shape) == 3 and not self.tokens


class BorderInput:
    """What terms and heads read at one border for one batch: the block's output and what follows from it.

    h: the block's output. statistics: its channel statistics, (B, C) or (B, T, C) per token, which heads read. alpha:
    the same, at least in single precision. Both carry gradients. feedback: the border's feedback network, from which a
    loss gets beta. belief: the joint prediction of the earlier exits, (B, n) or (B, T, n), if it is handed on with h; a
    constant.

    >>> from blocklocal import BlockLocal
    >>> learner = BlockLocal([nn.Linear(8, 16), nn.Linear(16, 3)], classes=3, example=torch.randn(2, 8))
    >>> learner.borders[0].message(torch.randn(4, 16)).alpha.shape
    torch.Size([4, 16])
    """

    def __init__(
        self,
        h: Tensor,
        *,
        spec: BorderSpec,
        statistic: Statistic,
        feedback: nn.Module | None,
        belief: Tensor | None = None,
    ) -> None:
        self.h, self.spec, self.statistic, self.feedback, self.belief = h, spec, statistic, feedback, belief
        self._predictions: dict[nn.Module, Tensor] = {}
        self._statistics: Tensor | None = None
        self._alpha: Tensor | None = None

    def predict(self, head: nn.Module) -> Tensor:
        """The prediction of a head, added to the belief if there is one. Computed once."""
        if head not in self._predictions:
            self._predictions[head] = add_belief(self.belief, head(self))
        return self._predictions[head]

    @property
    def statistics(self) -> Tensor:
        if self._statistics is None:  # a cached_property has a lock, which would break the compiled graph
            self._statistics = self._reduced()
        return self._statistics

    def _reduced(self) -> Tensor:
        if not self.spec.reduces:
            return self.h.movedim(1, -1) if self.spec.channels_first else self.h
        if getattr(self.statistic, "reads_map", False):
            return self.statistic(self.map)
        if self.spec.channels_first:
            return self.statistic(self.h.flatten(2))
        return self.statistic(self.h.flatten(1, -2).transpose(1, 2))

    @property
    def map(self) -> Tensor:
        """The features as a map (B, C, H, W), if the spec `is_map`."""
        assert self.spec.is_map
        return self.h if self.spec.channels_first else self.h.permute(0, 3, 1, 2)

    @property
    def alpha(self) -> Tensor:
        if self._alpha is None:
            self._alpha = self.statistics.to(at_least_single(self.h.dtype))
        return self._alpha
