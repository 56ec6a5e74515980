"""What stands at a border for one batch: the block's output, its channel statistics and the feedback they meet.

A statistic reduces positions, h (B, C, P) -> (B, C): feature maps (B, C, H, W) have P = H W positions, token sequences
(B, T, D) have P = T, vectors (B, D) one. Where the model predicts per token, every token is a position of its own and
alpha is (B, T, D).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from blocklocal.feedback import Targets

Statistic = Callable[[Tensor], Tensor]
Criterion = Callable[[Tensor, Tensor], Tensor]


def spatial_mean(positions: Tensor) -> Tensor:
    """Mean over positions: (B, C, P) -> (B, C).

    A sum that is divided after, since the gradient of torch.mean is written out for every position.
    """
    total = positions.sum(2, dtype=torch.promote_types(positions.dtype, torch.float32))
    return (total / positions.shape[2]).to(positions.dtype)


def spatial_max(positions: Tensor) -> Tensor:
    """Maximum over positions: (B, C, P) -> (B, C)."""
    return positions.amax(2)


def spatial_std(positions: Tensor) -> Tensor:
    """Standard deviation over positions: (B, C, P) -> (B, C). Zero, with gradient zero, where there is one position."""
    variance = positions.var(2, correction=0)
    return torch.where(variance > 0, variance, torch.ones_like(variance)).sqrt() * (variance > 0)


def memory_order(h: Tensor) -> tuple[int, ...]:
    """The dimensions of h from the outermost to the innermost in memory."""
    return tuple(sorted(range(h.dim()), key=lambda d: (-h.stride(d), d)))


def dense(h: Tensor) -> Tensor:
    """h, or a contiguous copy where it does not fill its memory (a slice, an expanded tensor)."""
    return h if h.permute(memory_order(h)).is_contiguous() else h.contiguous()


@dataclass(frozen=True)
class Site:
    """Where a border stands: the shape (C, H, W), (T, D) or (D,) of one sample of h, and what to predict there."""

    shape: tuple[int, ...]
    targets: Targets
    tokens: bool
    criterion: Criterion

    @property
    def is_map(self) -> bool:
        return len(self.shape) == 3

    @property
    def channels(self) -> int:
        return self.shape[0] if len(self.shape) > 2 else self.shape[len(self.shape) - 1]


class Message:
    """The forward message of one batch at one border.

    h: the block's output. statistics: its channel statistics, (B, C) or per token (B, T, C), which heads read. alpha:
    the same, at least in single precision. Both carry the gradient. feedback: the border's feedback network, from which
    a loss gets beta.
    """

    def __init__(self, h: Tensor, *, site: Site, statistic: Statistic, feedback: nn.Module | None) -> None:
        self.h, self.site, self.statistic, self.feedback = h, site, statistic, feedback

    @cached_property
    def statistics(self) -> Tensor:
        if self.h.dim() > 3:
            return self.statistic(self.h.flatten(2))
        if self.h.dim() == 3 and not self.site.tokens:
            return self.statistic(self.h.transpose(1, 2))
        return self.h

    @cached_property
    def alpha(self) -> Tensor:
        return self.statistics.to(torch.promote_types(self.h.dtype, torch.float32))
