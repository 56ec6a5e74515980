"""Hooked: borders inside the model's own forward pass."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer

from blocklocal.arguments import loss_of, require, require_function, require_gradients, require_number, require_tensor
from blocklocal.border import Border
from blocklocal.exits import ExitPool
from blocklocal.feedback import ClosedFormFeedback, Feedback, at_least_single
from blocklocal.graph import mode
from blocklocal.hooked.operations import segment_operations
from blocklocal.hooked.places import balanced
from blocklocal.hooked.probe import Output, probe
from blocklocal.hooked.taps import Taps, Visit
from blocklocal.hooked.values import Inputs, call, check_inputs, prediction_of, tensors
from blocklocal.inputs import check_frozen, check_owners, check_parameters, check_settings, check_steps
from blocklocal.layout import Layout, given_layouts
from blocklocal.collapse import warn_of_collapse
from blocklocal.local_learner import LocalLearner, cross_entropy, targets_of
from blocklocal.lookahead import Lookahead
from blocklocal.losses import BLL, LocalLoss, Predictive
from blocklocal.messages import Criterion, Statistic, add_belief, dense, spatial_mean
from blocklocal.shape_probe import border_spec, check_prediction


class Hooked(LocalLearner):
    """Trains `model` in blocks inside its own forward pass: a border is a forward hook on a submodule.

    Nothing is traced: the model runs as its author wrote it, with any number of inputs, branches, output objects. At a
    border the hook takes the features that the submodule returns (its first tensor), computes the local loss, runs the
    local backward pass, which frees the block's graph, and hands the features on without gradient. What needs no
    gradient, such as masks and positions, passes freely. On models that both can cut, `BlockLocal` learns the same to
    the bit; a pipeline of processes and whole-block compilation are made of its blocks.

    model: any module. x of a batch, and `example`, are what it takes: model(x) of a tensor, model(*x) of a tuple,
    model(**x) of a dict. at: a border stands after each of these submodules; blocks: or the number of blocks, see
    `split`. output: from what the model returns to its prediction (B, n) or (B, T, n); by default the tensor itself,
    its `logits`, or the first of a tuple. tied: allow parameters that several blocks read, which all their losses move.
    The other settings are those of `BlockLocal`.

    ValueError: a submodule that is not called exactly once, a value with a gradient that passes a border beside the
    features, tied parameters, all by name and before anything learns.

    >>> class Gated(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.inner, self.outer = nn.Linear(8, 16), nn.Linear(16, 3)
    ...     def forward(self, x, mask):
    ...         return self.outer(self.inner(x).relu() * mask)
    >>> x = (torch.randn(4, 8), torch.ones(4, 1))
    >>> learner = Hooked(Gated(), at=["inner"], classes=3, example=x)
    >>> learner.backward(x, torch.tensor([0, 2, 1, 0])).shape
    torch.Size([2])
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        at: Sequence[str] | None = None,
        blocks: int | None = None,
        classes: int | None = None,
        outputs: int | None = None,
        example: Inputs,
        output: Output = prediction_of,
        balance: Literal["time", "memory"] = "memory",
        loss: LocalLoss = BLL,
        feedback: Feedback = ClosedFormFeedback(),  # noqa: B008 (frozen settings)
        statistic: Statistic = spatial_mean,
        criterion: Criterion | None = None,
        layout: Layout | Sequence[Layout] | None = None,
        add_beliefs: bool = False,
        tied: bool = False,
    ) -> None:
        super().__init__()
        require(model, nn.Module, name="model", needed="pass an nn.Module")
        self.targets = targets_of(classes, outputs)
        if criterion is None:
            if not self.targets.labels:
                raise ValueError("dense targets have no loss of their own: pass criterion=, such as mse_loss")
            criterion = cross_entropy
        check_settings(loss=loss, feedback=feedback, statistic=statistic, criterion=criterion, example=None)
        require_function(output, name="output", needed="pass a function from what the model returns to its prediction")
        for name, given in (("add_beliefs", add_beliefs), ("tied", tied)):
            require(given, bool, name=name, needed="pass True or False")
        check_inputs(example, name="example")
        check_parameters(model)
        if any(isinstance(term, Predictive) and isinstance(term.head, Lookahead) for _, term in loss.terms):
            raise ValueError("Lookahead() copies a unit of the block that follows, which only BlockLocal has")
        self.model, self.criterion, self.output = model, criterion, output

        def build(h: Tensor, prediction: Tensor, found: Layout | None, **place: Any) -> Border:
            spec = border_spec(h, layout=found, prediction=prediction, targets=self.targets, criterion=self.criterion)
            spec = replace(spec, per_channel=getattr(statistic, "per_channel", 1), **place)
            return Border(spec, loss=loss, feedback=feedback, statistic=statistic).to(h)

        if at is None:
            (one,) = given_layouts(layout, borders=1) if isinstance(layout, str) else (None,)
            at = balanced(model, blocks, example, output=output, balance=balance, build=build, layout=one)
        elif blocks is not None:
            raise ValueError("at= and blocks= both say where to cut: pass one of them")
        require(at, Sequence, name="at", needed="pass a list of names of submodules")
        if isinstance(at, str):
            raise ValueError(f"at={at!r}: pass a list of submodules, at=[{at!r}]")
        seen = probe(model, at, example, output=output, size=self.targets.size, tied=tied)
        self.cuts = seen.names
        """The submodules after which a border stands, in the order of the forward pass."""
        layouts = given_layouts(layout, borders=len(self.cuts))
        count = any(isinstance(term, Predictive) and term.budget is not None for _, term in loss.terms)
        operations = segment_operations(model, self.cuts, example, output=output) if count else [None] * len(self.cuts)
        self.borders = nn.ModuleList(
            build(h, seen.outputs[-1], chosen or found, depth=k / len(layouts), operations=operations[k])
            for k, (h, chosen, found) in enumerate(zip(seen.outputs, layouts, seen.layouts, strict=False))
        )
        for k, h in enumerate(seen.outputs[:-1]):
            self._border(k).check(h[:2])
            if add_beliefs:
                _ = self._border(k).predictive  # there must be one
        self.adds_beliefs = add_beliefs
        self.pool = ExitPool(len(self.cuts) + 1, labels=self.targets.labels)
        self._owned, self._tied, self._writes_input = seen.parameters, seen.tied, seen.writes_input
        self._dimensions = seen.outputs[-1].dim()
        self._taps = Taps(model, self.cuts)

    def forward(self, x: Inputs, y: Tensor) -> tuple[Tensor, ...]:
        """The local losses, with all graphs alive: the backward pass of their sum gives each block its own gradient.

        In training mode closed-form feedback is fitted to the batch, unless no gradients are recorded.
        """
        self._check(x, y)
        if torch.is_grad_enabled():
            self._check_replicas()
        losses: list[Tensor] = []

        def learn(k: int, loss: Tensor) -> None:
            losses.append(loss)

        self._learn(x, y, learn)
        return tuple(losses)

    def backward(
        self,
        x: Inputs,
        y: Tensor,
        *,
        scale: float | Tensor = 1.0,
        optimizers: Sequence[Optimizer] | None = None,
        scaler: GradScaler | None = None,
    ) -> Tensor:
        """One step's gradients, each block's at its border, with the graph of one block alive at a time (Fig. 2).

        As `BlockLocal.backward`; returns the local losses (K,), detached and unscaled.
        """
        require_gradients("backward")
        self._check(x, y)
        self._check_replicas()
        step = self._stepper(scale=scale, optimizers=optimizers, scaler=scaler)
        losses: list[Tensor] = []

        def learn(k: int, loss: Tensor) -> None:
            losses.append(loss.detach())
            step(k, loss)

        self._learn(x, y, learn)
        return torch.stack(losses)
