"""What every learner has: borders, exits, and steps of one block at a time."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.nn import functional as F
from torch.optim import Optimizer

from blocklocal.arguments import require, require_whole
from blocklocal.border import Border
from blocklocal.exits import Exit, ExitPool
from blocklocal.feedback import Targets, share_feedback
from blocklocal.graph import mode
from blocklocal.inputs import check_frozen, check_owners, check_steps
from blocklocal.messages import Criterion
from blocklocal.replicas import Group, processes


class LocalLearner(nn.Module):
    """A model with a local loss at each of its borders, whichever way its blocks come about.

    targets, criterion: of the last block, and of predictions at borders. borders: K - 1 of them, for K blocks. pool:
    the weights of the exits.
    """

    targets: Targets
    criterion: Criterion
    borders: nn.ModuleList
    pool: ExitPool
    adds_beliefs: bool
    cuts: list[str]
    """The submodules after which the borders stand, in the order of the forward pass: the `at` of the same learner."""

    def __init__(self) -> None:
        super().__init__()
        self._steppers: tuple[int, ...] = ()  # the optimizers that were checked last

    def block_parameters(self, k: int) -> list[nn.Parameter]:
        """The parameters that learn from local loss k: those of block k and of its border."""
        raise NotImplementedError

    def exits(self, x: Any) -> list[Tensor]:
        """The predictions of all K exits: those at the borders, then the model's."""
        raise NotImplementedError

    def _check(self, x: Any, y: Tensor) -> None:
        """TypeError, ValueError: a batch that nothing can be learnt from."""
        raise NotImplementedError

    def share_feedback(self, group: Group = None) -> None:
        """Fit closed-form feedback to the batches of several processes that train this learner together.

        Each process has its share of every batch, as with DDP: the feedback is then that of the whole batch, the same
        in all of them. group: a process group, None for all processes, or False if this process trains this learner
        alone, whatever the others do. Call it on every process before training, before or after the process groups are
        created; every process must then go through the same number of batches.
        """
        allowed = "pass a process group, None for all processes, or False for a learner of this process alone"
        if group is not None and group is not False:
            kind = torch.distributed.ProcessGroup if torch.distributed.is_available() else ()
            require(group, kind, name="group", needed=allowed)
        share_feedback(self, group)

    @torch.no_grad()
    def fit_exits(self, batches: Iterable[tuple[Tensor, Tensor]]) -> tuple[float, ...]:
        """Fit the weights of the exits for exit="all" to held-out samples (x, y), and return them.

        In evaluation mode: the K numbers that minimise the criterion of the combined prediction on all batches.

        >>> import blocklocal as bll
        >>> learner = bll.BlockLocal([nn.Linear(8, 16), nn.Linear(16, 3)], classes=3, example=torch.randn(2, 8))
        >>> len(learner.fit_exits([(torch.randn(4, 8), torch.tensor([0, 2, 1, 0]))]))
        2
        """
        exits, targets = [], []
        with mode(self, training=False):
            for x, y in batches:
                self._check(x, y)
                exits.append(self.exits(x))
                targets.append(y)
        if not targets:
            raise ValueError("batches is empty: held-out samples are needed to weight the exits")
        self.pool.fit(
            [torch.cat(parts) for parts in zip(*exits, strict=True)], torch.cat(targets), criterion=self.criterion
        )
        return self.pool.weights

    def _stepper(
        self, *, scale: float | Tensor, optimizers: Sequence[Optimizer | None] | None, scaler: GradScaler | None
    ) -> Callable[[int, Tensor], None]:
        """A function of k and local loss k: its backward pass, and the step of its optimizer where there is one."""
        blocks = len(self.borders) + 1
        check_steps(optimizers, scaler=scaler, scale=scale, blocks=blocks)
        if optimizers is not None and self._steppers != (steppers := tuple(map(id, optimizers))):
            check_owners(optimizers, [self.block_parameters(k) for k in range(blocks)])
            self._steppers = steppers
        if optimizers is None:
            self._warn_of_heads()

        def step(k: int, loss: Tensor) -> None:
            if optimizers is not None and optimizers[k] is None:
                return
            if not loss.requires_grad:
                check_frozen(self.block_parameters(k), k=k)
            else:
                with torch.autocast(loss.device.type, enabled=False):
                    scaled = loss * scale
                    (scaled if scaler is None else scaler.scale(scaled)).backward()
            optimizer = None if optimizers is None else optimizers[k]
            if optimizer is not None:
                if scaler is None:
                    optimizer.step()
                elif loss.requires_grad:
                    scaler.step(optimizer)
                optimizer.zero_grad(set_to_none=True)

        return step

    def _warn_of_heads(self) -> None:
        """A UserWarning where the blocks were stepped and their gradients are gone, but not those of the borders."""
        kept = any(parameter.grad is not None for parameter in self.borders.parameters())
        borders = set(self.borders.parameters())
        blocks = [p for p in self.parameters() if p.requires_grad and p not in borders] if kept else []
        if blocks and all(parameter.grad is None for parameter in blocks):
            warnings.warn(
                "the heads at the borders still have gradients of the step before, but the blocks have none: an "
                "optimizer of model.parameters() leaves the heads untrained; pass it learner.parameters()",
                stacklevel=4,
            )

    def _border(self, k: int) -> Border:
        border = self.borders[k]
        assert isinstance(border, Border)
        return border

    def _read(self, exit: int | Literal["all"] | None) -> tuple[list[Exit | None], ExitPool | None]:
        """The exits 0 to `exit` that its prediction reads, None for the others, and what combines them."""
        combined = isinstance(exit, str) and exit == "all"
        k = len(self.borders) if combined else self._exit(exit)
        read = [j < len(self.borders) and (j == k or combined or self.adds_beliefs) for j in range(k + 1)]
        exits = [Exit(self._border(j)) if is_read else None for j, is_read in enumerate(read)]
        return exits, self.pool if combined else None

    def _exit(self, exit: object) -> int:
        last = len(self.borders)
        try:
            return last if exit is None else require_whole(exit, name="exit", least=0, most=last)
        except (TypeError, ValueError):
            raise ValueError(f'exit={exit!r}: choose a block 0 to {last} or "all"') from None

    def _check_replicas(self) -> None:
        """ValueError: several processes train, and what they share has not been said."""
        if not self.training or processes() == 1:
            return
        feedback = [border.feedback for border in self.borders]
        if any(getattr(one, "replicas", False) is None for one in feedback):
            raise ValueError(
                f"{processes()} processes train, and each would fit its feedback to its own share of a batch only: "
                "call learner.share_feedback() if they train one learner together, as with DDP, or "
                "learner.share_feedback(False) if each trains its own learner"
            )


def targets_of(classes: int | None, outputs: int | None, *, ignore_index: int | None = None) -> Targets:
    """ValueError: neither of the two, or both, or a number that leaves nothing to tell apart."""
    if (classes is None) == (outputs is None):
        raise ValueError("pass either classes= (integer labels) or outputs= (dense targets)")
    if classes is not None:
        if require_whole(classes, name="classes", least=1) == 1:
            raise ValueError("classes=1: with one class there is nothing to tell apart; pass at least 2")
        return Targets(int(classes), labels=True, ignore_index=ignore_index)
    return Targets(require_whole(outputs, name="outputs", least=1), labels=False, ignore_index=ignore_index)


def criterion_of(criterion: Criterion | None, *, targets: Targets) -> Criterion:
    """Cross-entropy for labels that come without a criterion. ValueError: dense targets without one."""
    if criterion is not None:
        return criterion
    if not targets.labels:
        raise ValueError("dense targets have no loss of their own: pass criterion=, such as mse_loss")
    return cross_entropy if targets.ignore_index is None else partial(cross_entropy, ignore_index=targets.ignore_index)


def cross_entropy(prediction: Tensor, y: Tensor, *, ignore_index: int = -100) -> Tensor:
    """Mean cross-entropy in nats of logits (B, n), or (B, T, n) per token, for labels (B,) or (B, T)."""
    if y.shape != prediction.shape[:-1]:
        raise ValueError(
            f"y has shape {tuple(y.shape)}, but the prediction {tuple(prediction.shape)}: one label for each of its "
            "vectors is needed"
        )
    return F.cross_entropy(prediction.flatten(0, -2), y.flatten(), ignore_index=ignore_index)
