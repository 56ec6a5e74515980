"""BlockLocal: a chain of blocks, each trained on its own local loss."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from blocklocal.border import Border
from blocklocal.feedback import ClosedFormFeedback, Feedback, Targets
from blocklocal.graph import mode
from blocklocal.losses import BLL, LocalLoss
from blocklocal.messages import Criterion, Statistic, dense, spatial_mean
from blocklocal.split import share, split
from blocklocal.survey import site_of, survey


class CollapseWarning(UserWarning):
    """A block's output no longer tells the targets apart."""


def cross_entropy(prediction: Tensor, y: Tensor) -> Tensor:
    """Mean cross-entropy in nats of logits (B, n) or per token (B, T, n) at labels (B,) or (B, T)."""
    return F.cross_entropy(prediction.flatten(0, -2), y.flatten())


class BlockLocal(nn.Module):
    """Trains `model` in blocks: at each border a local loss, and no gradient crosses it.

    model: any module, or a list of modules. at, blocks, balance: where to cut, see `split`; neither cuts a list or an
    nn.Sequential between its modules; blocks=1 is backpropagation. example: a batch of inputs, needed for borders.
    classes: labels are integers 0..classes-1, one per sample (B,) or per token (B, T). outputs: dense targets of so
    many numbers, (B, outputs). loss: the local loss at each border. feedback, statistic: how beta and alpha are made.
    criterion: the loss of the last block and of predictions at borders, (prediction, y) -> scalar; cross-entropy for
    labels.

    The model passed in shares its parameters with the blocks: it is the trained model, its state dict is as it was.

    >>> learner = BlockLocal([nn.Linear(8, 16), nn.Linear(16, 3)], classes=3, example=torch.randn(2, 8))
    >>> learner.backward(torch.randn(4, 8), torch.tensor([0, 2, 1, 0])).shape
    torch.Size([2])
    """

    def __init__(
        self,
        model: nn.Module | Sequence[nn.Module],
        *,
        at: Sequence[str] | None = None,
        blocks: int | None = None,
        classes: int | None = None,
        outputs: int | None = None,
        example: Tensor | None = None,
        balance: Literal["time", "memory"] = "memory",
        loss: LocalLoss = BLL,
        feedback: Feedback = ClosedFormFeedback(),  # noqa: B008 (frozen settings)
        statistic: Statistic = spatial_mean,
        criterion: Criterion | None = None,
    ) -> None:
        super().__init__()
        self.targets = _targets(classes, outputs)
        if criterion is None:
            if not self.targets.labels:
                raise ValueError("dense targets have no loss of their own: pass criterion=, such as mse_loss")
            criterion = cross_entropy
        self.criterion: Criterion = criterion
        if not isinstance(model, nn.Module):
            model = nn.Sequential(*model)
        self._model = (model,)  # in a tuple, since its modules are registered as blocks

        def border(h: Tensor, prediction: Tensor) -> Callable[[Tensor], Tensor]:
            site = site_of(h, prediction=prediction, targets=self.targets, criterion=self.criterion)
            y = prediction[..., 0].long().zero_() if self.targets.labels else prediction
            trial = Border(site, loss=loss, feedback=feedback, statistic=statistic).to(h)
            return lambda h: trial(h, y)

        self.blocks = nn.ModuleList(split(model, at=at, blocks=blocks, example=example, balance=balance, border=border))
        given, self._writes_input = survey(self.blocks, example, size=self.targets.size)
        self.borders = nn.ModuleList(
            Border(
                site_of(h, prediction=given[-1], targets=self.targets, criterion=self.criterion),
                loss=loss,
                feedback=feedback,
                statistic=statistic,
            ).to(h)
            for h in given[:-1]
        )

    @property
    def model(self) -> nn.Module:
        """The model that was passed in."""
        return self._model[0]

    def local(self, k: int, h: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Forward pass of block k: (local loss with its graph, output detached), from a detached input h.

        The output is what the next block reads; that of the last block is the prediction.
        """
        h = self._forward(k, h)
        loss = self.criterion(h, y) if k == len(self.borders) else self.borders[k](h, y)
        return loss, h.detach()

    def exit(self, k: int, h: Tensor) -> tuple[Tensor, Tensor]:
        """Forward pass of block k: (prediction of exit k, output), from its input h."""
        h = self._forward(k, h)
        return (h if k == len(self.borders) else self._border(k).predict(h)), h

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        """The local losses, with all graphs alive: the backward pass of their sum gives each block its own gradient."""
        self.targets.check(y)
        losses, h = [], x
        for k in range(len(self.blocks)):
            loss, h = self.local(k, h, y)
            losses.append(loss)
        return tuple(losses)

    def backward(
        self,
        x: Tensor,
        y: Tensor,
        *,
        scale: float | Tensor = 1.0,
        optimizers: Sequence[Optimizer] | None = None,
    ) -> Tensor:
        """One step's gradients, block after block, with the graph of one block alive at a time (Fig. 2).

        Gradients of scale * loss add to those that are there: scale=1/n accumulates n batches, and a GradScaler's
        scale goes here. optimizers: one per block; each is stepped and its gradients are freed directly after its
        block's backward. Returns the local losses (K,), detached.
        """
        self.targets.check(y)
        if optimizers is not None and len(optimizers) != len(self.blocks):
            raise ValueError(f"{len(optimizers)} optimizers for {len(self.blocks)} blocks: pass one per block")
        losses, h = [], x
        for k in range(len(self.blocks)):
            loss, h = self.local(k, h, y)
            if loss.requires_grad:  # else everything that it could move is frozen
                with torch.autocast(loss.device.type, enabled=False):
                    (loss * scale).backward()
            losses.append(loss.detach())
            del loss
            if optimizers is not None:
                optimizers[k].step()
                optimizers[k].zero_grad(set_to_none=True)
        return torch.stack(losses)

    def block_parameters(self, k: int) -> list[nn.Parameter]:
        """The parameters that learn from local loss k: those of block k and of its border."""
        return [
            *self.blocks[k].parameters(),
            *(p for border in self.borders[k : k + 1] for p in border.parameters()),
        ]

    @torch.no_grad()
    def exits(self, x: Tensor) -> list[Tensor]:
        """The predictions of all K exits: those at the borders, then the model's."""
        predictions, h = [], x
        for k in range(len(self.blocks)):
            prediction, h = self.exit(k, h)
            predictions.append(prediction)
        return predictions

    @torch.no_grad()
    def predict(
        self, x: Tensor, *, exit: int | Literal["all"] | None = None, confidence: float | None = None
    ) -> Tensor:
        """The prediction (B, n) of the last block, without gradient.

        exit=k: that of exit k, 0 to K-1, running no later block. exit="all": the mean over exits, of
        log-probabilities for labels. confidence: each sample leaves at the first exit whose largest class probability
        reaches it.
        """
        last = len(self.blocks) - 1
        if confidence is not None:
            if exit is not None or not self.targets.labels:
                raise ValueError(
                    "confidence= chooses the exit by class probability: pass no exit=, and only with labels"
                )
            return self._predict_confident(x, confidence=confidence)
        if exit == "all":
            exits = self.exits(x)
            if self.targets.labels:
                exits = [prediction.log_softmax(-1) for prediction in exits]
            return torch.stack(exits).mean(0)
        k = last if exit is None else exit
        if not isinstance(k, int) or not 0 <= k <= last:
            raise ValueError(f'exit={exit!r}: choose a block 0 to {last} or "all"')
        h = x
        for j in range(k):
            h = self._forward(j, h)
        return self.exit(k, h)[0]

    @torch.no_grad()
    def diagnose(self, x: Tensor, y: Tensor) -> list[dict[str, float]]:
        """What a batch shows of each border, in evaluation mode: see `Border.diagnose`. Warns of a collapsed block."""
        self.targets.check(y)
        reports, h = [], x
        with mode(self, training=False):
            for k in range(len(self.borders)):
                h = self._forward(k, h)
                reports.append(self._border(k).diagnose(h, y))
        warn_of_collapse(reports)
        return reports

    def compile(self, *, backend: str | Callable = "inductor", dynamic: bool | None = None) -> None:
        """Compile each block with torch.compile, in place."""
        for block in self.blocks:
            if type(block).__module__.startswith("torch.nn."):  # torch.compile passes over code of torch.nn itself
                block.forward = partial(_call, block.forward)
            block.compile(backend=backend, dynamic=dynamic)

    def train(self, mode: bool = True) -> BlockLocal:
        self.model.train(mode)
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> BlockLocal:
        self.model._apply(fn, recurse)
        self.borders._apply(fn, recurse)
        given = set(self.model.modules())
        for block in self.blocks:
            if isinstance(block, fx.GraphModule) and block not in given:
                share(self.model, block)
        return self

    def _border(self, k: int) -> Border:
        border = self.borders[k]
        assert isinstance(border, Border)
        return border

    def _forward(self, k: int, h: Tensor) -> Tensor:
        torch.clear_autocast_cache()  # of weights as they were before an optimizer step, or cast without a graph
        if k > 0:
            h = dense(h)  # as it travels from one process to another: strides decide the last bits of what follows
        return self.blocks[k](h.clone() if self._writes_input[k] else h)

    def _predict_confident(self, x: Tensor, *, confidence: float) -> Tensor:
        h, waiting, decided = x, torch.arange(len(x), device=x.device), None
        for k in range(len(self.blocks)):
            logits, h = self.exit(k, h)
            decided = logits.clone() if decided is None else decided.index_copy(0, waiting, logits.to(decided.dtype))
            least = logits.softmax(-1).amax(-1, keepdim=True).flatten(1).amin(1)  # over a sample's tokens
            stays = least < confidence
            h, waiting = h[stays], waiting[stays]
            if not len(waiting):
                break
        assert decided is not None
        return decided


def warn_of_collapse(reports: Sequence[dict[str, float]]) -> None:
    """A CollapseWarning for each border whose report, see `Border.diagnose`, shows that its block has collapsed."""
    for k, report in enumerate(reports):
        if not report["variance_ratio"] > 1e-3:
            warnings.warn(
                f"block {k} has collapsed: its output no longer tells the targets apart "
                f"(variance ratio {report['variance_ratio']:.1e}); raise the weight of bll.Predictive()",
                CollapseWarning,
                stacklevel=3,
            )


def _targets(classes: int | None, outputs: int | None) -> Targets:
    if (classes is None) == (outputs is None):
        raise ValueError("pass either classes= (integer labels) or outputs= (dense targets)")
    size = classes if classes is not None else outputs
    if not isinstance(size, int) or size < 1:
        raise ValueError(f"{'classes' if classes is not None else 'outputs'}={size!r}: a positive integer is needed")
    return Targets(size, labels=classes is not None)


def _call(forward: Callable[[Tensor], Tensor], h: Tensor) -> Tensor:
    return forward(h)
