"""BlockLocal: a chain of blocks, each trained on its own local loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import islice
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer

from blocklocal.arguments import (
    describe,
    loss_of,
    module_of,
    require,
    require_dense,
    require_function,
    require_gradients,
    require_number,
    require_tensor,
    require_whole,
)
from blocklocal.border_factory import BorderFactory
from blocklocal.collapse import warn_of_collapse
from blocklocal.exits import ExitPool, Predictor
from blocklocal.feedback import ClosedFormFeedback, Feedback, at_least_single
from blocklocal.graph import mode
from blocklocal.inputs import (
    Example,
    check_batch,
    check_parameters,
    check_settings,
)
from blocklocal.internals import Convertible, convert
from blocklocal.layout import Layout, given_layouts
from blocklocal.local_learner import LocalLearner, criterion_of, targets_of
from blocklocal.losses import BLL, LocalLoss
from blocklocal.messages import BorderInput, Criterion, Statistic, add_belief, dense, spatial_mean
from blocklocal.outline import Outline, adopt, share
from blocklocal.shape_probe import check_prediction, probe_shapes
from blocklocal.split import divide

Features = Tensor | tuple[Tensor, Tensor]
"""What a block reads: features and, with add_beliefs, the belief of the exits before it."""


class BlockLocal(LocalLearner, Convertible):
    """Trains `model` in blocks, with a local loss at each border; no gradient crosses a border.

    model: any module, or a list of modules. at, blocks, balance: where to cut, see `split`; without them a list or an
    nn.Sequential is cut between its modules; blocks=1 is backpropagation. example: an input batch, needed for borders.
    classes: labels are integers 0..classes-1, one per sample (B,) or per token (B, T). outputs: number of dense targets
    per sample, (B, outputs). ignore_index: the label of padding, which counts in no loss, statistic or diagnostic.
    loss: the local loss at each border. feedback, statistic: how beta and alpha are made. criterion: the loss of the
    last block and of predictions at borders, (prediction, y) -> scalar; cross-entropy for labels. layout: what the
    features are, "tokens" (channels last), "signal" or "map" (channels second), at all borders or at each; by default
    inferred from the weights that write and read them. add_beliefs: every exit predicts the sum of its own logits and
    those of the exits before it (Eq. 2 for categorical messages), which are handed on with the features and are
    constants for it. The trained model is then the model with its heads, see `predictor`, not the model alone.

    The model passed in shares its parameters with the blocks: it is the trained model, and its state dict keeps its
    names.

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
        ignore_index: int | None = None,
        example: Tensor | None = None,
        balance: Literal["time", "memory"] = "memory",
        loss: LocalLoss = BLL,
        feedback: Feedback = ClosedFormFeedback(),  # noqa: B008 (frozen settings)
        statistic: Statistic = spatial_mean,
        criterion: Criterion | None = None,
        layout: Layout | Sequence[Layout] | None = None,
        add_beliefs: bool = False,
    ) -> None:
        super().__init__()
        model = module_of(model)
        self.targets = targets_of(classes, outputs, ignore_index=ignore_index)
        criterion = criterion_of(criterion, targets=self.targets)
        check_settings(loss=loss, feedback=feedback, statistic=statistic, criterion=criterion, example=example)
        self.criterion: Criterion = criterion
        check_parameters(model)
        self._model = (model,)  # in a tuple, since its modules are registered as blocks

        if blocks is not None and layout is not None and not isinstance(layout, str):
            raise ValueError("layout= for each border needs at= or a list of modules; with blocks=K pass one for all")

        borders = BorderFactory(self.targets, criterion, loss, feedback, statistic, layout)
        chain, self.cuts = divide(model, at=at, blocks=blocks, example=example, balance=balance, border=borders.trial)
        self.blocks = nn.ModuleList(chain)
        self._outline = Outline(model, self.blocks)
        seen = probe_shapes(model, self.blocks, example, size=self.targets.size, count=borders.counts_operations)
        self._writes_input = seen.writes_input
        layouts = given_layouts(layout, borders=len(self.blocks) - 1)
        self.borders = nn.ModuleList(
            borders.build(
                h,
                seen.outputs[-1],
                chosen or found,
                depth=k / len(layouts),
                operations=seen.operations[k],
                following=self.blocks[k + 1],
            )
            for k, (h, chosen, found) in enumerate(zip(seen.outputs, layouts, seen.layouts, strict=False))
        )
        for k, h in enumerate(seen.outputs[:-1]):
            if not h.is_meta:
                self._border(k).check(h[:2])
            if add_beliefs:
                _ = self._border(k).predictive  # there must be one
        require(add_beliefs, bool, name="add_beliefs", needed="pass True or False")
        self.adds_beliefs = add_beliefs
        self.pool = ExitPool(len(self.blocks), labels=self.targets.labels)
        if self.borders:
            borders.check_criterion()
        self._regions: list[Region] = []  # once compiled; in a list, since blocks are registered as blocks
        self._examples: list[Example] = []  # of every block, and the prediction; none where there is no border
        if self.borders and example is not None:
            self._examples = [Example(k, tuple(h.shape), h.dtype) for k, h in enumerate([example, *seen.outputs])]

    @property
    def model(self) -> nn.Module:
        """The model that was passed in."""
        return self._model[0]

    def local(self, k: int, h: Features, y: Tensor) -> tuple[Tensor, Any]:
        """Forward pass of block k: (local loss with its graph, output detached), from a detached input h.

        The output is what the next block reads; that of the last block is the prediction. With add_beliefs it is a
        pair, the block's output and the belief, and so is h except for block 0.
        """
        k = self._index(k)
        h, belief = self._received(k, h)
        self.targets.check_kind(y)
        try:
            if self._regions:
                return self._regions[k](self._prepared(k, h), belief, y)
            return self._learn(k, self._forward(k, h), belief, y)
        except (RuntimeError, IndexError):
            if k < len(self.borders):
                self.targets.check(y)  # its values, which are worth a check only now
            raise

    def exit(self, k: int, h: Features) -> tuple[Tensor, Any]:
        """Forward pass of block k: (prediction of exit k, output), from its input h; both as for `local`."""
        k = self._index(k)
        h, belief = self._received(k, h)
        h = self._forward(k, h)
        if k < len(self.borders):
            border_input = self._border(k).message(h, belief)
            return self._border(k).predict(border_input), self._handed_on(k, border_input)
        check_prediction(h, size=self.targets.size)
        prediction = add_belief(belief, h)
        return prediction, prediction

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        """The local losses, with all graphs alive: the backward pass of their sum gives each block its own gradient.

        In training mode closed-form feedback is fitted to the batch, unless no gradients are recorded: a validation
        loss in torch.no_grad() leaves the feedback unchanged in either mode.
        """
        self._check(x, y)
        if torch.is_grad_enabled():
            self._check_replicas()
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
        optimizers: Sequence[Optimizer | None] | None = None,
        scaler: GradScaler | None = None,
    ) -> Tensor:
        """Compute one step's gradients block by block, with the graph of one block alive at a time (Fig. 2).

        Gradients of scale * loss are added to existing ones: scale=1/n accumulates n batches. optimizers: one per
        block, or None where it does not learn; each is stepped and its gradients are freed right after its block's
        backward pass. scaler: scales every local loss and steps the optimizers; call its update() after the batch,
        which this method does not. Returns the local losses (K,), detached and unscaled.
        """
        require_gradients("backward")
        self._check(x, y)
        self._check_replicas()
        step = self._stepper(scale=scale, optimizers=optimizers, scaler=scaler)
        losses, h = [], x
        for k in range(len(self.blocks)):
            loss, h = self.local(k, h, y)
            losses.append(loss.detach())
            step(k, loss)
            del loss
        return torch.stack(losses)

    def block_parameters(self, k: int) -> list[nn.Parameter]:
        """The parameters that learn from local loss k: those of block k and of its border."""
        k = self._index(k)
        return [
            *self.blocks[k].parameters(),
            *(p for border in self.borders[k : k + 1] for p in border.parameters()),
        ]

    @torch.no_grad()
    def exits(self, x: Tensor) -> list[Tensor]:
        """The predictions of all K exits: those at the borders, then the model's."""
        require_tensor(x, name="x")
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
        log-probabilities for labels, at least in single precision, or with the weights of `fit_exits`. confidence: each
        sample leaves at the first exit whose largest class probability reaches it.
        """
        require_tensor(x, name="x")
        if confidence is not None:
            if exit is not None or not self.targets.labels:
                raise ValueError(
                    "confidence= chooses the exit by class probability: pass no exit=, and only with labels"
                )
            require_number(confidence, name="confidence", above=0, most=1)
            return self._predict_confident(x, confidence=confidence)
        if isinstance(exit, str) and exit == "all":
            return self.pool(self.exits(x))
        k, h = self._exit(exit), x
        for j in range(k):
            h = self.exit(j, h)[1] if self.adds_beliefs else self._forward(j, h)
        return self.exit(k, h)[0]

    def predictor(self, *, exit: int | Literal["all"] | None = None) -> Predictor:
        """`predict` as a module without the learner, to save, compile or export; it shares the learner's weights.

        exit=None: the blocks alone. exit=k: blocks 0 to k and the head of exit k, without the later blocks. exit="all":
        blocks, heads, weights.

        >>> learner = BlockLocal([nn.Linear(8, 16), nn.Linear(16, 3)], classes=3, example=torch.randn(2, 8))
        >>> early = learner.predictor(exit=0).eval()
        >>> sorted(early.blocks.state_dict())
        ['0.bias', '0.weight']
        """
        exits, pool = self._read(exit)
        return Predictor(self.blocks[: len(exits)], exits, pool=pool, add_beliefs=self.adds_beliefs)

    @torch.no_grad()
    def diagnose(self, x: Tensor, y: Tensor) -> list[dict[str, float]]:
        """Report what a batch shows of each border, in evaluation mode: see `Border.diagnose`. Warns of a collapse."""
        self._check(x, y)
        reports: list[dict[str, float]] = []
        given: Features = x
        with mode(self, training=False):
            for k in range(len(self.borders)):
                h, belief = self._received(k, given)
                border_input = self._border(k).message(self._forward(k, h), belief)
                reports.append(self._border(k).diagnose(border_input, y))
                given = self._handed_on(k, border_input)
        warn_of_collapse(reports)
        return reports

    def compile(self, *, backend: str | Callable = "inductor", dynamic: bool | None = None) -> None:
        """Compile each block with torch.compile, in place.

        For predictions it is compiled alone, for training together with its border and local loss.
        """
        if not isinstance(backend, str):
            require_function(backend, name="backend", needed="pass the name of a backend or a function")
        elif backend not in torch.compiler.list_backends(exclude_tags=()):
            known = ", ".join(map(repr, torch.compiler.list_backends()))
            raise ValueError(f"backend={backend!r}: choose {known}, or pass a function")
        require(dynamic, bool | None, name="dynamic", needed="pass True, False or None")
        for k, block in enumerate(self.blocks):
            if isinstance(block, torch.jit.ScriptModule):
                raise ValueError(f"block {k} is a ScriptModule, which is already compiled: pass its original module")
        for block in self.blocks:
            if type(block).__module__.startswith("torch.nn."):  # torch.compile skips the code of torch.nn itself
                block.forward = partial(_call, block.forward)
            block.compile(backend=backend, dynamic=dynamic)
        self._regions = [Region(self, k) for k in range(len(self.blocks))]
        for region in self._regions:
            region.compile(backend=backend, dynamic=dynamic)

    def train(self, mode: bool = True) -> BlockLocal:
        self.model.train(mode)
        return super().train(mode)

    def convert(self, fn: Callable[[Tensor], Tensor], *, recurse: bool = True) -> None:
        """Replace each parameter and buffer by fn(tensor); the blocks stay those of the model."""
        self._outline.check()
        convert(self.model, fn, recurse=recurse)
        for name, child in self.named_children():  # the borders, and a criterion that is a module
            if name != "blocks":
                convert(child, fn, recurse=recurse)
        for block in self._traced():
            share(self.model, block)
        self._outline.note()

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        weights = {"pool._extra_state": self.pool.get_extra_state()}  # kept if the state has only the blocks
        result = super().load_state_dict({**weights, **state_dict}, strict=strict, assign=assign)
        if assign:
            for block in self._traced():
                adopt(self.model, block)
            self._outline.note()
        return result

    def _traced(self) -> list[nn.Module]:
        """The blocks that are not the model's own modules."""
        given = set(self.model.modules())
        return [block for block in self.blocks if block not in given]

    def _received(self, k: int, h: Features) -> tuple[Tensor, Tensor | None]:
        """The features that block k receives, and the belief if there is one."""
        if k == 0 or not self.adds_beliefs:
            require_tensor(h, name="h")
            assert isinstance(h, Tensor)
            return h, None
        if not isinstance(h, tuple) or len(h) != 2:
            raise TypeError(
                f"h is {describe(h)}: with add_beliefs block {k} reads a pair, features and belief, as block {k - 1} "
                "hands them on"
            )
        for part in h:
            require_tensor(part, name="h")
        return h

    def _handed_on(self, k: int, border_input: BorderInput, *, detached: bool = False) -> Features:
        """What block k hands on to the next one."""
        h = border_input.h.detach() if detached else border_input.h
        if not self.adds_beliefs:
            return h
        belief = self._border(k).predict(border_input)
        return h, belief.detach() if detached else belief

    def _index(self, k: int) -> int:
        return require_whole(k, name="k", least=0, most=len(self.blocks) - 1)

    def _check(self, x: Tensor, y: Tensor) -> None:
        check_batch(x, y, targets=self.targets, examples=self._examples)

    def _learn(self, k: int, h: Tensor, belief: Tensor | None, y: Tensor) -> tuple[Tensor, Any]:
        """What `local` returns, from the output h of block k."""
        if k < len(self.borders):
            border_input = self._border(k).message(h, belief)
            return self.borders[k](border_input, y), self._handed_on(k, border_input, detached=True)
        check_prediction(h, size=self.targets.size)
        if self.borders:
            self.targets.match(y, h, what="the prediction")
        prediction = add_belief(belief, h)
        return loss_of(self.criterion, prediction, y), prediction.detach()

    def _forward(self, k: int, h: Tensor) -> Tensor:
        h = self._prepared(k, h)
        try:
            return self.blocks[k](h)
        except (RuntimeError, IndexError, TypeError) as error:
            if self._examples:
                self._examples[k].explain(h, error, block=self.blocks[k])
            raise

    def _prepared(self, k: int, h: Tensor) -> Tensor:
        """The input of block k as the block gets it, after a check."""
        if k == 0:
            self._outline.check()
        if h.is_meta:
            raise ValueError("x is on the meta device, where tensors have no values: pass inputs on a real device")
        if self._examples:
            self._examples[k].check(h)
        if any(parameter.is_meta for parameter in islice(self.blocks[k].parameters(), 1)):
            raise ValueError(
                f"block {k} is on the meta device, where nothing is computed: give it memory with to_empty(device=...) "
                "and initialise it, or build the model on a real device"
            )
        torch.clear_autocast_cache()  # it may hold weights from before an optimizer step, or without a graph
        if k > 0:
            require_dense(h, name="h")
            h = dense(h)  # as between processes: strides decide the last bits of what follows
        return h.clone() if self._writes_input[k] else h

    def _predict_confident(self, x: Tensor, *, confidence: float) -> Tensor:
        h, waiting, decided = x, x, None
        for k in range(len(self.blocks)):
            logits, h = self.exit(k, h)
            if decided is None:
                decided, waiting = logits.clone(), torch.arange(len(logits), device=logits.device)
            else:
                decided = decided.index_copy(0, waiting, logits.to(decided.dtype))
            surest = logits.to(at_least_single(logits.dtype)).softmax(-1).amax(-1, keepdim=True)
            least = surest.flatten(1).amin(1)  # over a sample's tokens
            stays = least < confidence
            h = (h[0][stays], h[1][stays]) if isinstance(h, tuple) else h[stays]
            waiting = waiting[stays]
            if not len(waiting):
                break
        assert decided is not None
        return decided


class Region(nn.Module):
    """The part of `BlockLocal.local` that is compiled as one: block, border and loss."""

    def __init__(self, learner: BlockLocal, k: int) -> None:
        super().__init__()
        self._learner, self.k = (learner,), k

    def forward(self, h: Tensor, belief: Tensor | None, y: Tensor) -> tuple[Tensor, Any]:
        (learner,) = self._learner
        return learner._learn(self.k, learner.blocks[self.k](h), belief, y)


def _call(forward: Callable[[Tensor], Tensor], h: Tensor) -> Tensor:
    return forward(h)
