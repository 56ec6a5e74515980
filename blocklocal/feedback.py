"""The feedback network: beta_k = g_k(y), the message about the latent variable of border k that the targets send.

Linear feedback is beta = Y W, Y being the one-hot labels or the dense targets. Its loss is convex in W, and the
optimum over a mini-batch is ridge least squares from two sufficient statistics (paper, section 2.1),

    S <- g S + Y'Y,   R <- g R + Y'A,   W <- W + (S + r I)^-1 (R - S W),

with forgetting factor g and ridge r. The correction form pulls towards the present W instead of zero, so that
directions which no target excites any more keep their weight; from W = 0 it is ordinary ridge regression. For one-hot
labels S is diagonal and row c of W is the mean of alpha over class c; classes absent from a batch are left alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Targets:
    """What the model is to predict: `size` classes (integer labels) or `size` numbers (dense targets)."""

    size: int
    labels: bool

    def check(self, y: Tensor) -> None:
        """Raise a ValueError where y cannot be such targets. Values are looked at on the CPU only, where it is free."""
        if y.is_meta:
            raise ValueError("y is on the meta device, where tensors have no values")
        if not self.labels:
            if y.shape[-1:] != (self.size,):
                raise ValueError(f"y has shape {tuple(y.shape)}: dense targets need {self.size} in the last dimension")
            return
        if y.dtype != torch.int64:
            raise ValueError(
                f"y has dtype {y.dtype}: labels are integers, pass y.long(); for dense targets pass outputs= instead"
            )
        if y.device.type == "cpu" and y.numel() and not 0 <= int(y.min()) <= int(y.max()) < self.size:
            raise ValueError(f"labels run from {int(y.min())} to {int(y.max())}: allowed is 0 to {self.size - 1}")


class Feedback(Protocol):
    """Settings of a feedback network; `build` makes that of one border."""

    def build(self, targets: Targets, *, channels: int) -> nn.Module: ...


class LinearFeedback(nn.Module):
    """Linear feedback at its closed-form optimum, for any targets. beta (..., C) from y.

    `update(y, alpha)` moves the sufficient statistics and the weight on; no gradient ever reaches them. Where
    `process_group` is set, the statistics of a batch are summed over that group, so that replicas hold the same
    feedback.
    """

    weight: Tensor
    second: Tensor
    cross: Tensor

    def __init__(self, targets: Targets, *, channels: int, ridge: float, forgetting: float) -> None:
        super().__init__()
        self.targets, self.ridge, self.forgetting = targets, ridge, forgetting
        self.process_group: dist.ProcessGroup | None = None
        n = targets.size
        self.register_buffer("weight", torch.zeros(n, channels))
        self.register_buffer("second", torch.zeros(n) if targets.labels else torch.zeros(n, n))
        self.register_buffer("cross", torch.zeros(n, channels))

    def reset_parameters(self) -> None:
        for buffer in self.buffers():
            buffer.zero_()

    def forward(self, y: Tensor) -> Tensor:
        if self.targets.labels:
            return F.embedding(y, self.weight)
        with torch.autocast(self.weight.device.type, enabled=False):
            return y.to(self.weight.dtype) @ self.weight

    @torch.no_grad()
    def update(self, y: Tensor, alpha: Tensor) -> None:
        """Fit the weight to a batch: y as the targets say, alpha (..., C), at least in single precision."""
        dtype = torch.promote_types(alpha.dtype, self.weight.dtype)
        with torch.autocast(alpha.device.type, enabled=False):
            second, cross = self._statistics(y, alpha.flatten(0, -2).to(dtype))
            if self.process_group is not None:
                dist.all_reduce(second, group=self.process_group)
                dist.all_reduce(cross, group=self.process_group)
            self.second.mul_(self.forgetting).add_(second)
            self.cross.mul_(self.forgetting).add_(cross)
            weight = self.weight.to(dtype)
            if self.targets.labels:
                count = self.second.to(dtype).unsqueeze(-1)
                fitted = weight + (self.cross - count * weight) / (count + self.ridge)
                self.weight.copy_(torch.where(second.unsqueeze(-1) > 0, fitted, weight))
            else:
                gram = self.second.to(dtype)
                ridge = self.ridge * torch.eye(len(gram), dtype=dtype, device=gram.device)
                self.weight.copy_(weight + torch.linalg.solve_ex(gram + ridge, self.cross - gram @ weight).result)

    def _statistics(self, y: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
        """Y'Y (its diagonal for labels) and Y'A of a batch with alpha (M, C)."""
        if self.targets.labels:
            y, n = y.flatten(), self.targets.size
            second = alpha.new_zeros(n).index_add_(0, y, torch.ones_like(alpha[:, 0]))
            return second, alpha.new_zeros(n, alpha.shape[1]).index_add_(0, y, alpha)
        dense = y.flatten(0, -2).to(alpha.dtype)
        return dense.T @ dense, dense.T @ alpha


@dataclass(frozen=True)
class ClosedFormFeedback:
    """Linear feedback fitted in closed form to every batch: the optimum of the paper.

    `ridge` is in units of Y'Y (for labels: in samples). `forgetting` is the weight that a batch keeps from one step to
    the next; 0 fits the present batch alone, the paper's words.
    """

    ridge: float = 1e-3
    forgetting: float = 0.9

    def __post_init__(self) -> None:
        if not self.ridge > 0:
            raise ValueError(f"ClosedFormFeedback(ridge={self.ridge}): the ridge must be positive")
        if not 0 <= self.forgetting < 1:
            raise ValueError(f"ClosedFormFeedback(forgetting={self.forgetting}): allowed is 0 <= forgetting < 1")

    def build(self, targets: Targets, *, channels: int) -> LinearFeedback:
        return LinearFeedback(targets, channels=channels, ridge=self.ridge, forgetting=self.forgetting)


class FeedbackNetwork(nn.Module):
    """Feedback with ordinary parameters, trained by gradient descent on its own loss. beta (..., C) from y."""

    def __init__(self, targets: Targets, *, channels: int, depth: int, width: int) -> None:
        super().__init__()
        self.targets = targets
        sizes = [targets.size, *[width] * (depth - 1), channels]
        layers: list[nn.Module] = []
        for inputs, outputs in pairwise(sizes):
            layers += [nn.ReLU(), nn.Linear(inputs, outputs)]
        self.layers = nn.Sequential(*layers[1:])

    def forward(self, y: Tensor) -> Tensor:
        dense = F.one_hot(y, self.targets.size) if self.targets.labels else y
        return self.layers(dense.to(next(self.parameters()).dtype))


@dataclass(frozen=True)
class GradientFeedback:
    """Feedback of `depth` linear layers, ReLU between them, `width` wide inside, stepped by the optimizer."""

    depth: int = 2
    width: int = 256

    def __post_init__(self) -> None:
        if self.depth < 1 or self.width < 1:
            raise ValueError(f"GradientFeedback(depth={self.depth}, width={self.width}): both must be at least 1")

    def build(self, targets: Targets, *, channels: int) -> FeedbackNetwork:
        return FeedbackNetwork(targets, channels=channels, depth=self.depth, width=self.width)
