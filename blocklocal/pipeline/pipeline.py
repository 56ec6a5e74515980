"""Pipeline: the blocks of a learner over processes, each learning on its own while messages flow one way."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from blocklocal.arguments import (
    describe,
    require,
    require_dense,
    require_device,
    require_function,
    require_gradients,
    require_number,
    require_whole,
)
from blocklocal.border import Border
from blocklocal.feedback import at_least_single, share_feedback
from blocklocal.inputs import check_closure, stepped_by
from blocklocal.learner import BlockLocal, Features
from blocklocal.lookahead import lookaheads
from blocklocal.messages import BorderSpec
from blocklocal.pipeline.copies import begin_copies, between_ranks
from blocklocal.pipeline.executor import Executor, Minibatch
from blocklocal.pipeline.materialize import materialize
from blocklocal.pipeline.replicas import DataParallel, dimensions, replicate, share_buffers
from blocklocal.pipeline.schedule import Action, Placement, schedule
from blocklocal.pipeline.stage import LocalStep, MessageType, Stage
from blocklocal.pipeline.trace import Trace
from blocklocal.pipeline.wire import DTYPES, TensorSpec, digest
from blocklocal.unembedding import unembeddings
from blocklocal.values import Inputs, map_tensors, tensors

Batch = tuple[Inputs | None, Tensor]
PAIRS = "pass minibatches, pairs (x, y) of tensors"
LONGEST = 10**9  # seconds: more than a timer holds


class Pipeline:
    """Trains a learner whose blocks are spread over processes: no rank ever waits for another's gradient.

    Every rank builds the same learner, makes a pipeline of it and goes through the same minibatches (x, y): all of
    them read y; x is read by the rank of block 0 and by those whose blocks have side inputs, such as a mask, see
    `reads_inputs`. The weights are those of `learner.backward`, to the bit if the
    arithmetic is the same. A learner built on the meta device takes memory on a rank only for the rank's own blocks,
    which are then initialised from `seed`.

    optimizer: makes an optimizer from a block's parameters. placement: the rank of each block, by default as even as
    possible; `balanced` measures a better one. mesh: with a dimension "block" and, for replicas, "data"; by default all
    processes are one pipeline. data_parallel: makes the replicas of a block, `replicate` (DDP) or `shard` (FSDP2).
    message_dtype: of messages between blocks, by default that of the parameters; a narrower one rounds the outputs of
    all blocks but the last. window: number of minibatches that are handed in and out at once; a rank is never further
    ahead of the next one. prefetch: number of minibatches by which a receive is posted early. accumulate: number of
    minibatches whose mean gradient makes an optimizer step. timeout: seconds after which a missing message is an error
    that names rank, block and minibatch; over NCCL the process group's own timeout applies. seed: of random draws
    inside the blocks. trace: record what this rank does and when.

    lookahead: allow the local loss to look through copies of the next unit, see `Lookahead`. If the next block is on
    another rank, every refresh is a message in the opposite direction, the bytes of the unit's weights and statistics,
    for which a block waits until the next one has learnt from the minibatch before. With blocks of equal cost this
    takes the time of one forward pass, however many ranks there are, and that of the message.

    Under torch.autocast, around the whole loop or a part of it, the weights are also those of one process.

    >>> learner = BlockLocal([nn.Linear(8, 16), nn.Linear(16, 3)], classes=3, example=torch.randn(2, 8))
    >>> pipeline = Pipeline(learner, optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1))
    >>> batches = [(torch.randn(4, 8), torch.tensor([0, 2, 1, 0]))] * 3
    >>> for losses in pipeline.train(batches):  # in a single process, which has both blocks
    ...     print(pipeline.blocks, losses.shape)
    [0, 1] torch.Size([3, 2])
    """

    def __init__(
        self,
        learner: BlockLocal,
        *,
        optimizer: Callable[[list[nn.Parameter]], Optimizer],
        placement: Placement | Sequence[int] | None = None,
        mesh: DeviceMesh | None = None,
        data_parallel: DataParallel = replicate,
        device: torch.device | str = "cpu",
        message_dtype: torch.dtype | None = None,
        window: int = 8,
        prefetch: int = 2,
        accumulate: int = 1,
        timeout: float = 300.0,
        seed: int = 0,
        trace: bool = False,
        lookahead: bool = False,
    ) -> None:
        group, replicas = dimensions(mesh)
        require(learner, BlockLocal, name="learner", needed="pass a bll.BlockLocal")
        if learner.offloaded is not None:
            raise ValueError(
                "the learner is offloaded: end() it, since every process of a pipeline keeps its own blocks"
            )
        require_function(optimizer, name="optimizer", needed="pass a function from parameters to an optimizer")
        window = require_whole(window, name="window", least=1)
        prefetch = require_whole(prefetch, name="prefetch", least=1)
        accumulate = require_whole(accumulate, name="accumulate", least=1)
        require_number(timeout, name="timeout", above=0, most=LONGEST)
        seed = require_whole(seed, name="seed", least=0, most=2**63 - 1)
        require(trace, bool, name="trace", needed="pass True or False")
        require(lookahead, bool, name="lookahead", needed="pass True or False")
        require_function(data_parallel, name="data_parallel", needed="pass a function such as replicate or shard")
        if message_dtype is not None and message_dtype not in DTYPES:
            raise ValueError(f"message_dtype={message_dtype!r}: choose {', '.join(map(str, DTYPES))}")
        heads = lookaheads(learner.borders)
        if heads and not lookahead:
            raise ValueError(
                "a head of the learner copies a unit of the next block, but messages flow one way: pass lookahead=True "
                "to send copies in the opposite direction, or a learner without bll.Lookahead()"
            )
        if unembeddings(learner.borders):
            raise ValueError(
                "a head of the learner copies the model's output layer, which is on the rank of the last block: pass a "
                "learner without bll.Unembedding()"
            )
        self.learner, self.device, self.window = learner, require_device(device, name="device"), window
        if isinstance(learner.criterion, nn.Module):  # of the last block; those at borders move with them
            learner.criterion.to(self.device)
        self._replicas = replicas
        self.rank = dist.get_rank(group)
        self.placement = _place(placement, blocks=len(learner.blocks), ranks=dist.get_world_size(group))
        replica = 0 if replicas is None else replicas.get_local_rank()
        self.trace = Trace(rank=dist.get_rank(), replica=replica, device=self.device) if trace else None
        self.minibatches = 0
        """The number of minibatches that this rank has learnt from."""
        message_type = _message_type(learner, message_dtype)
        unborn = any(tensor.is_meta for head in heads for tensor in head.own())
        self.steps = [materialize(LocalStep(learner, k), device=self.device, seed=seed) for k in self.blocks]
        """The blocks of this rank with their borders."""
        copies = between_ranks(learner, self.placement, rank=self.rank)
        if unborn:
            begin_copies(
                learner, copies, blocks=self.blocks, rank=self.rank, group=group, device=self.device, timeout=timeout
            )
        for step in self.steps:
            share_feedback(step, False if replicas is None else replicas.get_group())
        self.stages = [
            Stage(
                step if replicas is None else _replicated(step, data_parallel, replicas),
                k,
                optimizer=_optimizer(optimizer, step),
                message_type=message_type,
                send_shape=None if k == len(learner.borders) else _site(learner, k).shape,
                accumulate=accumulate,
                seed=seed + replica,
                trace=self.trace,
            )
            for k, step in zip(self.blocks, self.steps, strict=True)
        ]
        if heads and any(isinstance(parameter, DTensor) for step in self.steps for parameter in step.parameters()):
            raise ValueError(
                "replicas that hold shares of a block have no unit to copy as a whole: pass data_parallel=replicate, "
                "or a learner without bll.Lookahead()"
            )

        def specs(k: int) -> list[TensorSpec]:
            features = TensorSpec(_site(learner, k).shape, message_type.dtype)
            belief = TensorSpec(_site(learner, k).prediction, at_least_single(message_type.dtype))
            return [features, belief] if learner.adds_beliefs else [features]

        self._executor = Executor(
            self.stages,
            receives={k: specs(k - 1) for k in self.blocks if self.placement.receives(k)},
            sends={k: specs(k) for k in self.blocks if self.placement.sends(k)},
            copies=copies,
            rank=self.rank,
            group=group,
            device=self.device,
            window=window,
            prefetch=prefetch,
            timeout=timeout,
        )
        self._prefetch = prefetch

    @property
    def blocks(self) -> list[int]:
        """The blocks of this rank."""
        return self.placement.blocks(self.rank)

    @property
    def reads_inputs(self) -> bool:
        """Whether this rank needs x of a minibatch: it has block 0, or a block that reads inputs of the model beside
        the features."""
        return self.blocks[0] == 0 or any(self.learner.side_inputs.read_by(k) for k in self.blocks)

    def train(self, batches: Iterable[Batch]) -> Iterator[Tensor]:
        """Learn from minibatches; yields the local losses (minibatches, blocks of this rank) of each window.

        All ranks must pass the same number of minibatches. Between two windows every rank has finished the same
        minibatches, though not at the same time: what each rank saves there fits together.
        """
        for results in self._run(batches, training=True):
            self.minibatches += len(results) // len(self.blocks)
            yield torch.stack(results).view(-1, len(self.blocks))

    @torch.no_grad()
    def predict(self, batches: Iterable[Batch]) -> Iterator[Tensor]:
        """Yield the predictions (blocks of this rank, B, n) of this rank's exits for each minibatch."""
        for results in self._run(batches, training=False):
            for m in range(0, len(results), len(self.blocks)):
                yield torch.stack(results[m : m + len(self.blocks)])

    @torch.no_grad()
    def diagnose(self, x: Inputs | None, y: Tensor) -> dict[int, dict[str, float]]:
        """Report what a batch shows of the border after each block of this rank: see `Border.diagnose`."""
        self.learner.targets.check(y)
        reports: dict[int, dict[str, float]] = {}

        def look(step: nn.Module, given: tuple[Any, ...], output: tuple[Tensor, Features]) -> None:
            assert isinstance(step, LocalStep)
            if isinstance(step.border, Border):
                h = output[1][0] if isinstance(output[1], tuple) else output[1]
                belief = given[0][1] if step.k > 0 and isinstance(given[0], tuple) else None
                reports[step.k] = step.border.diagnose(step.border.message(h, belief), y.to(self.device))

        hooks = [step.register_forward_hook(look) for step in self.steps]
        try:
            for _ in self.predict([(x, y)]):
                pass
        finally:
            for hook in hooks:
                hook.remove()
        return reports

    def _run(self, batches: Iterable[Batch], *, training: bool) -> Iterator[list[Tensor]]:
        """Yield what the stages' `finish` returned for each window. Between two, another run may change the mode."""
        require(batches, Iterable, name="batches", needed=PAIRS)
        remaining = iter(batches)
        self._set_mode(training=training)
        while given := list(islice(remaining, self.window)):
            window = [self._read(batch, training=training) for batch in given]
            if self.stages[0].training != training:
                self._set_mode(training=training)
            if training:
                require_gradients("Pipeline.train")
            minibatches = [
                Minibatch(
                    self.minibatches + m,
                    x=None if x is None else map_tensors(self._moved, x),
                    y=self._moved(y),
                    digests=self._digests(x, y),
                )
                for m, (x, y) in enumerate(window)
            ]
            copies = self._executor.begin(minibatches)
            results = self._executor.run(self._actions(len(window), copies if training else {}), minibatches)
            if self.trace and training:
                self.trace.record("wait", block=self.blocks[-1], minibatch=minibatches[-1].number)
            yield results

    def _set_mode(self, *, training: bool) -> None:
        if self._replicas is not None and not training and self.learner.training:
            for step in self.steps:
                share_buffers(step, self._replicas.get_group())
        if self.trace and training:
            self.trace.start()
        self.learner.train(training)
        for stage in self.stages:
            stage.train(training)

    def _actions(self, minibatches: int, copies: Mapping[int, Sequence[int]]) -> list[Action]:
        return schedule(self.placement, minibatches=minibatches, prefetch=self._prefetch, copies=copies)[self.rank]

    def _read(self, batch: Any, *, training: bool) -> Batch:
        """What this rank reads of a minibatch. TypeError, ValueError: not a minibatch, or one it cannot learn from."""
        if not isinstance(batch, Sequence) or isinstance(batch, str) or len(batch) != 2:
            raise TypeError(f"a minibatch is {describe(batch)}: {PAIRS}")
        x, y = batch
        if training:
            self.learner.targets.check(y)
        else:
            require_dense(y, name="y")
        if not y.dim():
            raise ValueError("y has shape (): one target per sample is needed")
        if not self.reads_inputs:
            return None, y
        if x is None:
            reader = "the rank of block 0" if self.blocks[0] == 0 else f"rank {self.rank}, for its side inputs,"
            raise ValueError(f"a minibatch without x: {reader} reads the inputs, pass them")
        self.learner.side_inputs.check(x)
        for tensor in tensors(x):
            require_dense(tensor, name="x")
        return x, y

    def _moved(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device, non_blocking=True)

    def _digests(self, x: Inputs | None, y: Tensor) -> tuple[int, ...]:
        """Of the targets and, if there are any, of the side inputs of all blocks; zero where this rank reads none."""
        names = self.learner.side_inputs.all()
        if not names:
            return (digest(y),)
        if x is None:
            return digest(y), 0
        given = self.learner.side_inputs.tensors(x)
        return digest(y), digest(*(given[name] for name in names))


def _place(placement: Placement | Sequence[int] | None, *, blocks: int, ranks: int) -> Placement:
    if placement is None:
        return Placement.even(blocks, ranks=ranks)
    placed = placement if isinstance(placement, Placement) else Placement(placement)
    if len(placed.ranks) != blocks or placed.size != ranks:
        raise ValueError(
            f"placement {list(placed.ranks)} is not one of {blocks} blocks on {ranks} ranks: pass the rank of each "
            "block, and use every rank"
        )
    return placed


def _message_type(learner: BlockLocal, message_dtype: torch.dtype | None) -> MessageType:
    own = next((p.dtype for p in learner.parameters() if p.is_floating_point()), torch.get_default_dtype())
    return MessageType(message_dtype or own, rounds=message_dtype is not None)


def _replicated(step: LocalStep, data_parallel: DataParallel, replicas: DeviceMesh) -> nn.Module:
    made = data_parallel(step, replicas)
    require(made, nn.Module, name="the return value of data_parallel", needed="it must be the module to call")
    return made


def _optimizer(optimizer: Callable[[list[nn.Parameter]], Optimizer], step: LocalStep) -> Optimizer | None:
    parameters = [parameter for parameter in step.parameters() if parameter.requires_grad]
    if not parameters:
        return None
    made = optimizer(parameters)
    require(made, Optimizer, name="the return value of optimizer", needed="it must be a torch.optim.Optimizer")
    check_closure(made, name="the return value of optimizer")
    if not set(stepped_by(made)) & set(map(id, parameters)):
        raise ValueError(f"optimizer= returns one without a parameter of block {step.k}: pass on those it is given")
    return made


def _site(learner: BlockLocal, k: int) -> BorderSpec:
    """The spec of border k."""
    border = learner.borders[k]
    assert isinstance(border, Border)
    return border.spec
