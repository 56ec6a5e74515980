"""BlockLocal: a chain of blocks, each trained on its own local loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from typing import Any, Literal, cast

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
    require_device,
    require_function,
    require_gradients,
    require_number,
    require_tensor,
    require_whole,
)
from blocklocal.border_factory import BorderFactory
from blocklocal.collapse import warn_of_collapse
from blocklocal.exits import ExitPool, Predictor, most_confident
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
from blocklocal.offload import Offloaded, Store
from blocklocal.outline import Outline, adopt, share
from blocklocal.output_layer import OutputLayer
from blocklocal.refreshed_head import refreshed
from blocklocal.shape_probe import check_prediction, probe_shapes
from blocklocal.side_inputs import SideInputs
from blocklocal.split import divide
from blocklocal.values import Inputs, prediction_of, tensors

Features = Tensor | tuple[Tensor, Tensor]
"""What a block hands on: features and, with add_beliefs, the belief of the exits so far."""


class BlockLocal(LocalLearner, Convertible):
    """Trains `model` in blocks, with a local loss at each border; no gradient crosses a border.

    model: any module, or a list of modules. at, blocks, balance: where to cut, see `split`; without them a list or an
    nn.Sequential is cut between its modules; blocks=1 is backpropagation. example: an input batch, needed for borders.
    It and x of a batch are what the model takes: model(x) of a tensor, model(*x) of a tuple, model(**x) of a dict. What
    later blocks read of it beside the features, such as a mask, are their side inputs, which are data as y is.
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
        example: Inputs | None = None,
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
        modes = [(module, module.training) for module in model.modules()]
        self.targets = targets_of(classes, outputs, ignore_index=ignore_index)
        criterion = criterion_of(criterion, targets=self.targets)
        check_settings(loss=loss, feedback=feedback, statistic=statistic, criterion=criterion, example=example)
        self.criterion: Criterion = criterion
        check_parameters(model)
        self._model = (model,)  # in a tuple, since its modules are registered as blocks

        if blocks is not None and layout is not None and not isinstance(layout, str):
            raise ValueError("layout= for each border needs at= or a list of modules; with blocks=K pass one for all")

        output_layer = None if example is None else OutputLayer(model, example, size=self.targets.size)
        borders = BorderFactory(self.targets, criterion, loss, feedback, statistic, layout, output_layer)
        chain, self.cuts = divide(model, at=at, blocks=blocks, example=example, balance=balance, border=borders.trial)
        self.blocks = nn.ModuleList(chain)
        self._outline = Outline(model, self.blocks, example=example)
        self.side_inputs = SideInputs(model, self.blocks, example=example)
        """What the blocks read of x beside the features."""
        if names := self.side_inputs.all():
            borders.check_side_inputs(names)
        seen = probe_shapes(
            model,
            self.blocks,
            example,
            inputs=self.side_inputs,
            size=self.targets.size,
            count=borders.counts_operations,
        )
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
        self.offloaded: Offloaded | None = None
        """The blocks in a store, after `offload`."""
        self._regions: list[Region] = []  # once compiled; in a list, since blocks are registered as blocks
        self._examples: list[Example] = []  # of every block, and the prediction; none where there is no border
        if self.borders and example is not None:
            first = next(tensors(example))
            self._examples = [Example(k, tuple(h.shape), h.dtype) for k, h in enumerate([first, *seen.outputs])]
        for module, training in modes:
            module.train(training)  # which also clears what some models cache in evaluation mode, as LeViT

    @property
    def model(self) -> nn.Module:
        """The model that was passed in."""
        return self._model[0]

    def local(self, k: int, h: Any, y: Tensor, *, x: Inputs | None = None) -> tuple[Tensor, Any]:
        """Forward pass of block k: (local loss with its graph, output detached), from a detached input h.

        The output is what the next block reads; that of the last block is the prediction. With add_beliefs it is a
        pair, the block's output and the belief, and so is h except for block 0, which reads the model's inputs. x: the
        model's inputs, for a later block that has side inputs.
        """
        k = self._index(k)
        h, belief = self._received(k, h)
        self.targets.check_kind(y)
        if k < len(self.borders):
            self._border(k).begin_step(self.model)
        try:
            if self._regions:
                return self._regions[k](*self._prepared(k, h, x), belief, y)
            return self._learn(k, self._forward(k, h, x), belief, y)
        except (RuntimeError, IndexError):
            if k < len(self.borders):
                self.targets.check(y)  # its values, which are worth a check only now
            raise

    def exit(self, k: int, h: Any, *, x: Inputs | None = None) -> tuple[Tensor, Any]:
        """Forward pass of block k: (prediction of exit k, output), from its input h; all as for `local`."""
        k = self._index(k)
        h, belief = self._received(k, h)
        h = self._forward(k, h, x)
        if k < len(self.borders):
            border_input = self._border(k).message(h, belief)
            return self._border(k).predict(border_input), self._handed_on(k, border_input)
        h = prediction_of(h)
        check_prediction(h, size=self.targets.size)
        prediction = add_belief(belief, h)
        return prediction, prediction

    def forward(self, x: Inputs, y: Tensor) -> tuple[Tensor, ...]:
        """The local losses, with all graphs alive: the backward pass of their sum gives each block its own gradient.

        In training mode closed-form feedback is fitted to the batch, unless no gradients are recorded: a validation
        loss in torch.no_grad() leaves the feedback unchanged in either mode.
        """
        self._check(x, y)
        if torch.is_grad_enabled():
            self._check_replicas()
            self._require_here("the graphs of all blocks cannot be alive at once; call backward()")
        losses: list[Tensor] = []
        h: Any = x
        for k in range(len(self.blocks)):
            loss, h = self.local(k, h, y, x=x)
            losses.append(loss)
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
        if self.offloaded is not None:
            self.offloaded.check_steps(optimizers)
        losses: list[Tensor] = []
        h: Any = x
        for k in range(len(self.blocks)):
            loss, h = self.local(k, h, y, x=x)
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
    def exits(self, x: Inputs) -> list[Tensor]:
        """The predictions of all K exits: those at the borders, then the model's."""
        self.side_inputs.check(x)
        return list(self._exits(x))

    @torch.no_grad()
    def predict(
        self, x: Inputs, *, exit: int | Literal["all"] | None = None, confidence: float | None = None
    ) -> Tensor:
        """The prediction (B, n) of the last block, without gradient.

        exit=k: that of exit k, 0 to K-1, running no later block. exit="all": the mean over exits, of
        log-probabilities for labels, at least in single precision, or with the weights of `fit_exits`. confidence: each
        sample leaves at the first exit whose largest class probability reaches it.
        """
        self.side_inputs.check(x)
        if confidence is not None:
            if exit is not None or not self.targets.labels:
                raise ValueError(
                    "confidence= chooses the exit by class probability: pass no exit=, and only with labels"
                )
            require_number(confidence, name="confidence", above=0, most=1)
            return self._predict_confident(x, confidence=confidence)
        if isinstance(exit, str) and exit == "all":
            return self.pool(self.exits(x))
        k, h = self._exit(exit), cast("Any", x)
        for j in range(k):
            h = self.exit(j, h, x=x)[1] if self.adds_beliefs else self._forward(j, h, x)
        return self.exit(k, h, x=x)[0]

    def predictor(self, *, exit: int | Literal["all"] | None = None) -> Predictor:
        """`predict` as a module without the learner, to save, compile or export; it shares the learner's weights.

        exit=None: the blocks alone. exit=k: blocks 0 to k and the head of exit k, without the later blocks. exit="all":
        blocks, heads, weights.

        >>> learner = BlockLocal([nn.Linear(8, 16), nn.Linear(16, 3)], classes=3, example=torch.randn(2, 8))
        >>> early = learner.predictor(exit=0).eval()
        >>> sorted(early.blocks.state_dict())
        ['0.bias', '0.weight']
        """
        self._require_here("a predictor would have no weights; call predict()")
        exits, pool = self._read(exit)
        return Predictor(
            self.blocks[: len(exits)], exits, inputs=self.side_inputs, pool=pool, add_beliefs=self.adds_beliefs
        )

    @torch.no_grad()
    def diagnose(self, x: Inputs, y: Tensor) -> list[dict[str, float]]:
        """Report what a batch shows of each border, in evaluation mode: see `Border.diagnose`. Warns of a collapse."""
        self._check(x, y)
        reports: list[dict[str, float]] = []
        given: Any = x
        with mode(self, training=False):
            for k in range(len(self.borders)):
                h, belief = self._received(k, given)
                border_input = self._border(k).message(self._forward(k, h, x), belief)
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
        self._require_here("blocks that come and go are not compiled")
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

    def offload(
        self,
        store: Store,
        *,
        optimizer: Callable[[list[nn.Parameter]], Optimizer] | None = None,
        device: torch.device | str | None = None,
        seed: int = 0,
        weights: Mapping[str, Tensor] | None = None,
        resume: bool = False,
    ) -> Offloaded:
        """Keep the blocks in `store`, and in memory only the one at work, with its optimizer's state.

        A block comes when its turn begins and leaves when another's does: then `backward` with the optimizers of the
        object returned, `local`, `exits`, `predict`, `fit_exits` and `diagnose` work as before, and give the same to
        the bit. store: `HostStore()` or `FileStore(folder)`. optimizer: from the parameters of a block and its border
        to their optimizer; None if nothing is trained. device: where blocks are trained, by default where they are; the
        CPU for a model on the meta device. Such a model is never in memory as a whole: each block is initialised, by
        `reset_parameters` of its modules, from `seed` and its index, when it is needed first, or takes its part of
        `weights`, a state dict of the model. resume: go on with what was saved in the store.

        ValueError: a learner with `Lookahead` or `Unembedding` heads, compiled or offloaded already; a block that
        cannot be initialised; a store with a saved run, or to resume, without one or of another model. Nothing has
        changed then.

        >>> import blocklocal as bll
        >>> learner = bll.BlockLocal([nn.Linear(8, 16), nn.Linear(16, 3)], classes=3, example=torch.randn(2, 8))
        >>> offloaded = learner.offload(bll.HostStore(), optimizer=lambda weights: torch.optim.Adam(weights))
        >>> learner.backward(torch.randn(4, 8), torch.tensor([0, 2, 1, 0]), optimizers=offloaded.optimizers).shape
        torch.Size([2])
        """
        for name in ("put", "get", "prefetch", "save", "resume"):
            if isinstance(store, type) or not callable(getattr(store, name, None)):
                raise TypeError(f"store is {describe(store)}: pass bll.HostStore() or bll.FileStore(folder)")
        if not callable(optimizer) and optimizer is not None:
            raise TypeError(f"optimizer is {describe(optimizer)}: pass a function from parameters to an optimizer")
        require(resume, bool, name="resume", needed="pass True or False")
        seed = require_whole(seed, name="seed", least=0, most=2**63 - 1)
        first = next((t for t in (*self.blocks.parameters(), *self.blocks.buffers())), torch.empty(0))
        where = require_device(("cpu" if first.is_meta else first.device) if device is None else device, name="device")
        self._require_here("it cannot be again")
        if self._regions:
            raise ValueError(
                "the learner is compiled, and blocks that come and go are not: offload() without compile()"
            )
        for head in refreshed(self.borders):
            raise ValueError(f"{head.settings} reads weights of a later block, which is elsewhere: use another head")
        self._outline.check()
        self.offloaded = Offloaded(
            self,
            self._outline,
            store,
            optimizer=optimizer,
            device=where,
            seed=seed,
            weights=weights,
            resume=resume,
        )
        return self.offloaded

    def train(self, mode: bool = True) -> BlockLocal:
        self.model.train(mode)
        return super().train(mode)

    def convert(self, fn: Callable[[Tensor], Tensor], *, recurse: bool = True) -> None:
        """Replace each parameter and buffer by fn(tensor); the blocks stay those of the model."""
        self._require_here("weights that are elsewhere are not converted; pass device= to offload()")
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

    def _require_here(self, why: str) -> None:
        """ValueError: the learner is offloaded."""
        if self.offloaded is not None:
            raise ValueError(f"the learner is offloaded, and {why}; offloaded.end() brings all blocks back")

    def _received(self, k: int, h: Any) -> tuple[Any, Tensor | None]:
        """The features that block k receives, the model's inputs for block 0, and the belief if there is one."""
        if k == 0:
            self.side_inputs.check_kind(h, name="h")
            return h, None
        if not self.adds_beliefs:
            require_tensor(h, name="h")
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

    def _check(self, x: Inputs, y: Tensor) -> None:
        self.side_inputs.check_kind(x, name="x")
        check_batch(x, y, targets=self.targets, examples=self._examples)

    def _learn(self, k: int, h: Tensor, belief: Tensor | None, y: Tensor) -> tuple[Tensor, Any]:
        """What `local` returns, from the output h of block k."""
        if k < len(self.borders):
            border_input = self._border(k).message(h, belief)
            return self.borders[k](border_input, y), self._handed_on(k, border_input, detached=True)
        h = prediction_of(h)
        check_prediction(h, size=self.targets.size)
        if self.borders:
            self.targets.match(y, h, what="the prediction")
        prediction = add_belief(belief, h)
        return loss_of(self.criterion, prediction, y), prediction.detach()

    def _forward(self, k: int, h: Any, x: Inputs | None) -> Tensor:
        args, kwargs = self._prepared(k, h, x)
        try:
            return self.blocks[k](*args, **kwargs)
        except (RuntimeError, IndexError, TypeError) as error:
            if self._examples:
                first = next(tensors([args, kwargs]))
                self._examples[k].explain(first, error, block=self.blocks[k])
            raise

    def _prepared(self, k: int, h: Any, x: Inputs | None) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of block k as the block gets them, after a check."""
        if k == 0:
            self._outline.check()
            self.side_inputs.check(h)
            x = h
        if any(tensor.is_meta for tensor in tensors(h)):
            raise ValueError("x is on the meta device, where tensors have no values: pass inputs on a real device")
        if self._examples and k > 0:
            self._examples[k].check(h)
        if any(parameter.is_meta for parameter in islice(self.blocks[k].parameters(), 1)):
            raise ValueError(
                f"block {k} is on the meta device, where nothing is computed: give it memory with to_empty(device=...) "
                "and initialise it, or build the model on a real device"
            )
        if self.offloaded is not None:
            self.offloaded.bring(k)
        torch.clear_autocast_cache()  # it may hold weights from before an optimizer step, or without a graph
        if k > 0:
            require_dense(h, name="h")
            h = dense(h)  # as between processes: strides decide the last bits of what follows
            h = h.clone() if self._writes_input[k] else h
        return self.side_inputs.call(k, h, x)

    def _exits(self, x: Inputs) -> Iterator[Tensor]:
        h: Any = x
        for k in range(len(self.blocks)):
            prediction, h = self.exit(k, h, x=x)
            yield prediction

    def _predict_confident(self, x: Inputs, *, confidence: float) -> Tensor:
        if not isinstance(x, Tensor) or self.side_inputs.all():  # which are not cut to the samples that stay
            return most_confident(self._exits(x), confidence=confidence)
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

    def forward(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], belief: Tensor | None, y: Tensor
    ) -> tuple[Tensor, Any]:
        (learner,) = self._learner
        return learner._learn(self.k, learner.blocks[self.k](*args, **kwargs), belief, y)


def _call(forward: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
    return forward(*args, **kwargs)
