"""The feedback network beta_k = g_k(y): the message that the targets send about the latent variable of border k.

Linear feedback is beta = Y W, where Y holds the one-hot labels or the dense targets. Its loss is convex in W, and the
optimum over a mini-batch is ridge least squares from two sufficient statistics (paper, section 2.1),

    S <- g S + Y'Y,   R <- g R + Y'A,   W <- W + (S + r I)^-1 (R - S W),

with forgetting factor g and ridge r. This form pulls W towards its present value instead of zero, so that directions
which no target excites any more keep their weight; from W = 0 it is ordinary ridge regression. For one-hot labels S is
diagonal and row c of W is the mean of alpha over class c; classes absent from a batch keep their row.

Samples whose alpha or dense target is not finite are left out, as are those so large that sums would overflow: no batch
can spoil the feedback for later ones. Statistics and weight are kept at least in single precision, whatever the dtype
of the model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from blocklocal.arguments import require_dense, require_number, require_whole
from blocklocal.internals import Convertible
from blocklocal.precision import full_precision
from blocklocal.replicas import Group, Replicas


@dataclass(frozen=True)
class Targets:
    """What the model predicts: `size` classes (integer labels) or `size` numbers (dense targets).

    ignore_index: the label of padding, which counts in no loss, no statistic and no diagnostic.

    >>> Targets(10, labels=True).size
    10
    """

    size: int
    labels: bool
    ignore_index: int | None = None

    def __post_init__(self) -> None:
        require_whole(self.size, name="size", least=1)
        if self.ignore_index is not None:
            require_whole(self.ignore_index, name="ignore_index")
            if not self.labels:
                raise ValueError("ignore_index= is a label, and dense targets have none: leave it out")

    def kept(self, y: Tensor) -> Tensor | None:
        """Which of the targets count, as booleans; None where all do."""
        return None if self.ignore_index is None else y != self.ignore_index

    def classes(self, y: Tensor) -> Tensor:
        """The labels y with class 0 in the place of those that do not count."""
        return y if self.ignore_index is None else torch.where(y == self.ignore_index, 0, y)

    def mean(self, values: Tensor, y: Tensor) -> Tensor:
        """The mean of one value for each target, (...) as many as targets, over those that count."""
        if self.ignore_index is None:
            return values.mean()
        kept = self.kept(y)
        assert kept is not None
        return torch.where(kept, values, 0.0).sum() / kept.sum().clamp(min=1)

    def check(self, y: Tensor) -> None:
        """ValueError: y cannot be such targets. Values are checked on the CPU only, where it is free."""
        self.check_kind(y)
        if not self.labels or y.device.type != "cpu":
            return
        if self.ignore_index is not None:
            y = y[y != self.ignore_index]
            if not len(y):
                raise ValueError(f"y: every label is ignore_index={self.ignore_index}: leave this batch out")
        if not 0 <= int(y.min()) <= int(y.max()) < self.size:
            padded = "; if negative labels are padding, pass ignore_index=" if int(y.min()) < 0 else ""
            raise ValueError(
                f"y: labels run from {int(y.min())} to {int(y.max())}, but must be from 0 to {self.size - 1}{padded}"
            )

    def check_kind(self, y: Tensor) -> None:
        """ValueError: y cannot be such targets, whatever its values."""
        if isinstance(y, tuple | list | dict):
            raise TypeError(
                f"y is a {type(y).__name__}: pass a torch.Tensor of targets, since every border makes its feedback of "
                "them; mixed labels (mixup) go as probabilities with outputs=, and sample weights into criterion="
            )
        require_dense(y, name="y")
        if not y.numel():
            raise ValueError(f"y has shape {tuple(y.shape)}: an empty batch has no loss, leave it out")
        if not self.labels:
            if y.shape[-1:] != (self.size,):
                column = "; pass y.unsqueeze(-1) for one number per sample" if self.size == 1 and y.dim() == 1 else ""
                raise ValueError(
                    f"y has shape {tuple(y.shape)}: dense targets need {self.size} in the last dimension{column}"
                )
            if not y.is_floating_point():
                raise ValueError(f"y has dtype {y.dtype}: dense targets are real numbers, pass y.float()")
            return
        if y.dtype != torch.int64:
            one_hot = y.is_floating_point() and y.dim() > 1 and y.shape[-1] == self.size
            remedy = "y.argmax(-1), if it is one-hot" if one_hot else "y.long()"
            raise ValueError(
                f"y has dtype {y.dtype}: labels are integers, pass {remedy}; for dense targets pass outputs= instead"
            )

    def match(self, y: Tensor, h: Tensor, *, what: str) -> None:
        """ValueError: y does not have one target for each vector of h (..., C), or is on another device."""
        rows = y.shape if self.labels else y.shape[:-1]
        if rows != h.shape[:-1]:
            one = "token" if h.dim() > 2 else "sample"
            raise ValueError(
                f"y has shape {tuple(y.shape)}, and {what} {tuple(h.shape)}: one target per {one} is needed"
            )
        if y.device != h.device:
            raise ValueError(f"y is on {y.device}, and {what} on {h.device}: pass y.to({str(h.device)!r})")


class Feedback(Protocol):
    """Settings of a feedback network; `build` makes the one of a border, a module y -> beta (B, channels).

    If the module has a method fit(y, alpha), it is called with every training batch.

    >>> class Zeros(Feedback):
    ...     def build(self, targets, *, channels):
    ...         return nn.Embedding.from_pretrained(torch.zeros(targets.size, channels))
    >>> Zeros().build(Targets(10, labels=True), channels=4)(torch.tensor([3])).shape
    torch.Size([1, 4])
    """

    def build(self, targets: Targets, *, channels: int) -> nn.Module: ...


class LinearFeedback(Convertible):
    """Linear feedback at its closed-form optimum, y -> beta (..., C), for any targets.

    `fit(y, alpha)` updates the sufficient statistics and the weight; no gradient ever reaches them. `replicas` are
    the processes over which the statistics of a batch are summed, so that each holds the same feedback; None until
    that has been decided, see `share_feedback`.
    """

    weight: Tensor
    second: Tensor
    cross: Tensor

    def __init__(self, targets: Targets, *, channels: int, ridge: float, forgetting: float) -> None:
        super().__init__()
        self.targets, self.ridge, self.forgetting = targets, ridge, forgetting
        self.replicas: Replicas | None = None
        n, dtype = targets.size, at_least_single(torch.get_default_dtype())
        self.register_buffer("weight", torch.zeros(n, channels, dtype=dtype))
        self.register_buffer("second", torch.zeros((n,) if targets.labels else (n, n), dtype=dtype))
        self.register_buffer("cross", torch.zeros(n, channels, dtype=dtype))
        self.register_load_state_dict_post_hook(_keep_single_precision)

    def reset_parameters(self) -> None:
        for buffer in self.buffers():
            buffer.zero_()

    def forward(self, y: Tensor) -> Tensor:
        if self.targets.labels:
            return F.embedding(self.targets.classes(y), self.weight)
        with full_precision(self.weight):
            return y.to(self.weight.dtype) @ self.weight

    @torch.no_grad()
    def fit(self, y: Tensor, alpha: Tensor) -> None:
        """Fit the weight to a batch of targets y and alpha (..., C), at least in single precision."""
        dtype = torch.promote_types(alpha.dtype, self.weight.dtype)
        with full_precision(alpha):
            second, cross = self._statistics(y, alpha.flatten(0, -2).to(dtype))
            if self.replicas is not None:
                self.replicas.sum(second, cross)
            self.second.mul_(self.forgetting).add_(second)
            self.cross.mul_(self.forgetting).add_(cross)
            weight = self.weight.to(dtype)
            if self.targets.labels:
                count = self.second.to(dtype).unsqueeze(-1)
                fitted = weight + (self.cross - count * weight) / (count + self.ridge)
                self.weight.copy_(torch.where(second.unsqueeze(-1) > 0, fitted, weight))
            else:
                gram = self.second.to(dtype)
                lost = torch.finfo(dtype).eps * gram.trace()  # a smaller ridge is lost to rounding
                ridge = lost.clamp(min=self.ridge) * torch.eye(len(gram), dtype=dtype, device=gram.device)
                self.weight.copy_(weight + torch.linalg.solve_ex(gram + ridge, self.cross - gram @ weight).result)

    def _statistics(self, y: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
        """Y'Y (its diagonal for labels) and Y'A over the usable samples of a batch with alpha (M, C)."""
        y = y.flatten() if self.targets.labels else y.flatten(0, -2).to(alpha.dtype)
        kept = self.targets.kept(y)
        if (
            kept is None and alpha.is_cpu and not torch.compiler.is_compiling()
        ):  # the check is free here: a GPU would synchronise
            sums = self._sums(y, alpha, weights=torch.ones_like(alpha[:, 0]))
            if all(_summable(total.flatten()) for total in sums):
                return sums
        counts = _summable(alpha)
        if kept is not None:
            counts, y = counts & kept, self.targets.classes(y)
        if not self.targets.labels:
            counts &= _summable(y)
            y = torch.where(counts.unsqueeze(1), y, 0.0)
        alpha = torch.where(counts.unsqueeze(1), alpha, 0.0)
        return self._sums(y, alpha, weights=counts.to(alpha.dtype))

    def _sums(self, y: Tensor, alpha: Tensor, *, weights: Tensor) -> tuple[Tensor, Tensor]:
        if not self.targets.labels:
            return y.T @ y, y.T @ alpha
        return _sums_by_class(y, weights, classes=self.targets.size), _sums_by_class(
            y, alpha, classes=self.targets.size
        )

    def convert(self, fn: Callable[[Tensor], Tensor], *, recurse: bool = True) -> None:
        """Replace each statistic by fn(statistic), but never below single precision."""
        for name, buffer in self.named_buffers():
            converted = fn(buffer)
            dtype = at_least_single(converted.dtype)
            setattr(self, name, converted if converted.dtype == dtype else buffer.to(converted.device, dtype))


def share_feedback(module: nn.Module, group: Group) -> None:
    """Fit each closed-form feedback inside `module` to the batches of all these processes."""
    for part in module.modules():
        if isinstance(part, LinearFeedback):
            part.replicas = Replicas(group)


def at_least_single(dtype: torch.dtype) -> torch.dtype:
    """The dtype for what half precision would spoil: sums over samples, statistics, probabilities."""
    return torch.promote_types(dtype, torch.float32)


def _keep_single_precision(feedback: nn.Module, incompatible_keys: object) -> None:
    """Restore single precision after load_state_dict(assign=True), which takes tensors as they are."""
    for name, buffer in feedback.named_buffers():
        setattr(feedback, name, buffer.to(at_least_single(buffer.dtype)))


def _summable(rows: Tensor) -> Tensor:
    """Whether sums of a row and of its products stay finite, for each row: no NaN, infinity or immense number."""
    immense = torch.finfo(rows.dtype).max ** 0.4  # 2.6e15 in single precision
    return torch.linalg.vector_norm(rows, dim=-1) < immense


def _sums_by_class(y: Tensor, rows: Tensor, *, classes: int) -> Tensor:
    """The sum of the rows of each class, in the same order every time, so that a run can be repeated to the bit."""
    sums = rows.new_zeros(classes, *rows.shape[1:])
    if rows.is_cpu:
        return sums.index_add_(0, y, rows)
    return sums.index_put_((y,), rows, accumulate=True)  # sorts; on a GPU, index_add_ adds in any order


@dataclass(frozen=True)
class ClosedFormFeedback:
    """Linear feedback fitted in closed form to every batch: the optimum of the paper.

    `ridge` is in units of Y'Y (for labels: in samples). `forgetting` is the weight that a batch keeps from one step to
    the next; 0 fits the present batch alone, as in the paper.

    >>> feedback = ClosedFormFeedback(forgetting=0.0).build(Targets(size=2, labels=True), channels=3)
    >>> feedback.fit(torch.tensor([0, 1]), torch.eye(3)[:2])
    >>> feedback(torch.tensor([1, 0])).round(decimals=2)
    tensor([[0., 1., 0.],
            [1., 0., 0.]])
    """

    ridge: float = 1e-3
    forgetting: float = 0.9

    def __post_init__(self) -> None:
        require_number(self.ridge, name="ridge", above=0)
        require_number(self.forgetting, name="forgetting", least=0, below=1)

    def build(self, targets: Targets, *, channels: int) -> LinearFeedback:
        return LinearFeedback(targets, channels=channels, ridge=self.ridge, forgetting=self.forgetting)


class FeedbackNetwork(nn.Module):
    """Feedback with ordinary parameters, y -> beta (..., C), trained by gradient descent on its own loss."""

    def __init__(self, targets: Targets, *, channels: int, depth: int, width: int) -> None:
        super().__init__()
        self.targets = targets
        sizes = [targets.size, *[width] * (depth - 1), channels]
        layers: list[nn.Module] = []
        for inputs, outputs in pairwise(sizes):
            layers += [nn.ReLU(), nn.Linear(inputs, outputs)]
        self.layers = nn.Sequential(*layers[1:])

    def forward(self, y: Tensor) -> Tensor:
        dense = F.one_hot(self.targets.classes(y), self.targets.size) if self.targets.labels else y
        return self.layers(dense.to(next(self.parameters()).dtype))


@dataclass(frozen=True)
class GradientFeedback:
    """Feedback of `depth` linear layers with ReLU between them, `width` wide inside, trained by the optimizer.

    A batch with NaN therefore spoils its parameters as it does those of the model, unless a GradScaler skips the step.

    >>> GradientFeedback(depth=2, width=64).build(Targets(size=10, labels=True), channels=3)(torch.tensor([1, 0])).shape
    torch.Size([2, 3])
    """

    depth: int = 2
    width: int = 256

    def __post_init__(self) -> None:
        require_whole(self.depth, name="depth", least=1)
        require_whole(self.width, name="width", least=1)

    def build(self, targets: Targets, *, channels: int) -> FeedbackNetwork:
        return FeedbackNetwork(targets, channels=channels, depth=self.depth, width=self.width)
