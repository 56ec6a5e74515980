"""Hooked: borders inside the model's own forward pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer

from blocklocal.arguments import loss_of, require, require_function, require_gradients, require_number, require_tensor
from blocklocal.border_factory import BorderFactory
from blocklocal.collapse import warn_of_collapse
from blocklocal.exits import ExitPool, Leaving
from blocklocal.feedback import ClosedFormFeedback, Feedback
from blocklocal.graph import mode
from blocklocal.hooked.operations import segment_operations
from blocklocal.hooked.places import balanced
from blocklocal.hooked.predictor import HookedPredictor, Left, copied
from blocklocal.hooked.probe import Output, nearest, probe
from blocklocal.hooked.taps import Taps, Visit
from blocklocal.inputs import check_parameters, check_settings
from blocklocal.layout import Layout, given_layouts
from blocklocal.local_learner import LocalLearner, criterion_of, targets_of
from blocklocal.lookahead import Lookahead
from blocklocal.losses import BLL, LocalLoss, Predictive
from blocklocal.messages import Criterion, Statistic, add_belief, dense, spatial_mean
from blocklocal.output_layer import OutputLayer
from blocklocal.shape_probe import check_prediction
from blocklocal.values import Inputs, call, check_inputs, prediction_of, tensors


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
        ignore_index: int | None = None,
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
        self.targets = targets_of(classes, outputs, ignore_index=ignore_index)
        criterion = criterion_of(criterion, targets=self.targets)
        check_settings(loss=loss, feedback=feedback, statistic=statistic, criterion=criterion, example=None)
        require_function(output, name="output", needed="pass a function from what the model returns to its prediction")
        for name, given in (("add_beliefs", add_beliefs), ("tied", tied)):
            require(given, bool, name=name, needed="pass True or False")
        check_inputs(example, name="example")
        check_parameters(model)
        if any(isinstance(term, Predictive) and isinstance(term.head, Lookahead) for _, term in loss.terms):
            raise ValueError("Lookahead() copies a unit of the block that follows, which only BlockLocal has")
        self.model, self.criterion, self.output = model, criterion, output

        output_layer = OutputLayer(model, example, size=self.targets.size, output=output)
        borders = BorderFactory(self.targets, criterion, loss, feedback, statistic, layout, output_layer)
        if at is None:
            if layout is not None and not isinstance(layout, str):
                raise ValueError("layout= for each border needs at=; with blocks=K pass one for all")
            at = balanced(model, blocks, example, output=output, balance=balance, border=borders.trial, tied=tied)
        elif blocks is not None:
            raise ValueError("at= and blocks= both say where to cut: pass one of them")
        require(at, Sequence, name="at", needed="pass a list of names of submodules")
        if isinstance(at, str):
            raise ValueError(f"at={at!r}: pass a list of submodules, at=[{at!r}]")
        seen = probe(model, at, example, output=output, size=self.targets.size, tied=tied)
        self.cuts = seen.names
        layouts = given_layouts(layout, borders=len(self.cuts))
        operations: list[float] | list[None] = [None] * len(self.cuts)
        if borders.counts_operations:
            operations = segment_operations(model, self.cuts, example, output=output)
        self.borders = nn.ModuleList(
            borders.build(h, seen.outputs[-1], chosen or found, depth=k / len(layouts), operations=operations[k])
            for k, (h, chosen, found) in enumerate(zip(seen.outputs, layouts, seen.layouts, strict=False))
        )
        for k, h in enumerate(seen.outputs[:-1]):
            self._border(k).check(h[:2])
            if add_beliefs:
                _ = self._border(k).predictive  # there must be one
        if self.borders:
            borders.check_criterion()
        self.adds_beliefs = add_beliefs
        self.pool = ExitPool(len(self.cuts) + 1, labels=self.targets.labels)
        self._owned, self._tied, self._reads = seen.parameters, seen.tied, seen.reads
        self._writes_input = seen.writes_input
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
        optimizers: Sequence[Optimizer | None] | None = None,
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

    def block_parameters(self, k: int) -> list[nn.Parameter]:
        """The parameters that learn from local loss k: those of block k and of its border.

        Block k's are those that its features, or the prediction, depend on through no earlier border. Any that the
        example did not reach belong to the block of the parameters next to them.
        """
        k = self._exit(k)
        known = dict(self.model.named_parameters())
        border = self.borders[k : k + 1]
        return [*(known[name] for name in self._owned[k]), *(p for one in border for p in one.parameters())]

    @torch.no_grad()
    def exits(self, x: Inputs) -> list[Tensor]:
        check_inputs(x, name="x")
        found: list[Tensor] = []
        prediction = self._predictions(x, lambda k, prediction: found.append(prediction))
        return [*found, prediction]

    @torch.no_grad()
    def predict(
        self, x: Inputs, *, exit: int | Literal["all"] | None = None, confidence: float | None = None
    ) -> Tensor:
        """The prediction (B, n), or per token (B, T, n), of the last block, without gradient.

        exit=k: that of exit k, which ends the forward pass there. exit="all": of all exits, with the weights of
        `fit_exits`. confidence: each sample's from the first exit whose largest class probability reaches it (of its
        least sure token); the forward pass ends once every sample has left.
        """
        check_inputs(x, name="x")
        if confidence is not None:
            if exit is not None or not self.targets.labels:
                raise ValueError(
                    "confidence= chooses the exit by class probability: pass no exit=, and only with labels"
                )
            require_number(confidence, name="confidence", above=0, most=1)
            return self._predict_confident(x, confidence=confidence)
        if isinstance(exit, str) and exit == "all":
            return self.pool(self.exits(x))
        last = self._exit(exit)

        def at_exit(k: int, prediction: Tensor) -> None:
            if k == last:
                raise Left(prediction)

        if last == len(self.borders) and not self.adds_beliefs:
            return self._predicted(call(self.model, x))
        try:
            return self._predictions(x, at_exit, only=None if self.adds_beliefs else last)
        except Left as left:
            return left.prediction

    def predictor(self, *, exit: int | Literal["all"] | None = None) -> HookedPredictor:
        """`predict` as a module without the learner, to save or export, which takes what the model takes.

        exit=None: the model alone. exit=k: the model up to exit k, and its head. exit="all": all exits, as combined. It
        is a copy of the model that shares its weights; below `exit=k` those that only later blocks read are left out.

        >>> learner = Hooked(nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 3)), at=["0"], classes=3,
        ...     example=torch.randn(4, 8))
        >>> early = learner.predictor(exit=0).eval()
        >>> sorted(early.model.state_dict())
        ['0.bias', '0.weight']
        """
        exits, pool = self._read(exit)
        model, taps = copied(self.model, self._taps, without=self._later(len(exits) - 1))
        return HookedPredictor(model, taps, exits, output=self.output, pool=pool, add_beliefs=self.adds_beliefs)

    @torch.no_grad()
    def diagnose(self, x: Inputs, y: Tensor) -> list[dict[str, float]]:
        """What a batch shows of each border, in evaluation mode: see `Border.diagnose`. Warns of a collapsed block."""
        self._check(x, y)
        reports: list[dict[str, float]] = []
        belief: Tensor | None = None

        def visit(k: int, h: Tensor) -> Tensor:
            nonlocal belief
            border_input = self._border(k).message(h, belief)
            reports.append(self._border(k).diagnose(border_input, y))
            belief = self._border(k).predict(border_input) if self.adds_beliefs else None
            return h

        with mode(self, training=False):
            self._pass(x, visit)
        warn_of_collapse(reports)
        return reports

    def remove(self) -> None:
        """Remove the hooks from the model, which is then as it was passed in, but trained; this learner ends."""
        self._taps.remove()

    def _later(self, k: int) -> list[str]:
        """The names of the parameters and buffers that only blocks after block k read."""
        readers = {name: j for j, names in reversed([*enumerate(self._reads)]) for name in names}
        owners = {name: j for j, names in reversed([*enumerate(self._owned)]) for name in names}
        found: list[str] = []
        for named in (self.model.named_parameters, self.model.named_buffers):
            first = {tensor: name for name, tensor in named()}  # of several names of one tensor
            for name, tensor in named(remove_duplicate=False):
                known = [of[first[tensor]] for of in (owners, readers) if first[tensor] in of]
                block = min(known) if known else nearest(name, owners)
                found += [name] if block is not None and block > k else []
        return found

    def _learn(self, x: Inputs, y: Tensor, learn: Callable[[int, Tensor], None]) -> None:
        """A forward pass in which learn(k, loss) is called with local loss k as soon as there is one."""
        belief: Tensor | None = None
        later = torch.is_grad_enabled()

        def visit(k: int, h: Tensor) -> Tensor:
            nonlocal belief
            self._border(k).begin_step(self.model)
            border_input = self._border(k).message(h, belief)
            loss = self.borders[k](border_input, y)
            belief = self._border(k).predict(border_input).detach() if self.adds_beliefs else None
            learn(k, loss)
            del loss, border_input
            torch.clear_autocast_cache()  # of weights as they were before a step, or cast with a graph that is gone
            h = dense(h.detach())  # as between the blocks of a chain: strides decide the last bits of what follows
            return h.clone() if later and self._writes_input[k] else h

        torch.clear_autocast_cache()
        prediction = self._pass(x, visit)
        if self.borders:
            self.targets.match(y, prediction, what="the prediction")
        learn(len(self.borders), loss_of(self.criterion, add_belief(belief, prediction), y))

    def _predictions(self, x: Inputs, seen: Callable[[int, Tensor], None], *, only: int | None = None) -> Tensor:
        """The model's prediction; seen(k, prediction) is called with that of exit k as soon as there is one."""
        belief: Tensor | None = None

        def visit(k: int, h: Tensor) -> Tensor:
            nonlocal belief
            if only is None or k == only:
                prediction = self._border(k).predict(self._border(k).message(h, belief))
                belief = prediction if self.adds_beliefs else None
                seen(k, prediction)
            return h

        prediction = self._pass(x, visit)
        return add_belief(belief, prediction)

    def _predict_confident(self, x: Inputs, *, confidence: float) -> Tensor:
        leaving = Leaving(confidence)

        def seen(k: int, logits: Tensor) -> None:
            if leaving.all_left(logits):
                raise Left(leaving.logits)

        try:
            seen(len(self.borders), self._predictions(x, seen))
        except Left as left:
            return left.prediction
        return leaving.logits

    def _pass(self, x: Inputs, visit: Visit) -> Tensor:
        """The prediction of one forward pass of the model, in which `visit` takes the features at each border."""
        with self._taps.visited(visit):
            returned = call(self.model, x)
        return self._predicted(returned)

    def _predicted(self, returned: object) -> Tensor:
        prediction = self.output(returned)
        require_tensor(prediction, name="output: what it returns")
        check_prediction(prediction, size=self.targets.size)
        return prediction

    def _check(self, x: Inputs, y: Tensor) -> None:
        check_inputs(x, name="x")
        self.targets.check(y)
        for name, tensor in (*(("x", tensor) for tensor in tensors(x)), ("y", y)):
            if torch.is_grad_enabled() and tensor.is_inference():
                raise ValueError(
                    f"{name} was made in torch.inference_mode() and cannot be learnt from: pass {name}.clone()"
                )
        dimensions = self._dimensions - self.targets.labels
        if y.dim() != dimensions:
            raise ValueError(
                f"y has shape {tuple(y.shape)}, and the model's prediction for example= had {self._dimensions} "
                f"dimensions: targets of {dimensions} dimension{'s' * (dimensions > 1)} are needed"
            )

    def _stepper(
        self, *, scale: float | Tensor, optimizers: Sequence[Optimizer | None] | None, scaler: GradScaler | None
    ) -> Callable[[int, Tensor], None]:
        if optimizers is not None and self._tied:
            raise ValueError(
                f"optimizers= would step {self._tied[0]!r}, which several blocks read, before all have added their "
                "gradients: step one optimizer of learner.parameters() after backward()"
            )
        return super()._stepper(scale=scale, optimizers=optimizers, scaler=scaler)
