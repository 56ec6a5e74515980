"""Pipeline: the blocks of a learner over processes, each learning on its own while messages flow one way."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import Optimizer

from blocklocal.arguments import require, require_function, require_gradients, require_number, require_whole
from blocklocal.border import Border
from blocklocal.feedback import share_feedback
from blocklocal.inputs import stepped_by
from blocklocal.learner import BlockLocal
from blocklocal.pipeline.executor import Executor, Minibatch
from blocklocal.pipeline.materialize import materialize
from blocklocal.pipeline.replicas import DataParallel, replicate, share_buffers
from blocklocal.pipeline.schedule import Action, Placement, schedule
from blocklocal.pipeline.stage import LocalStep, MessageType, Stage
from blocklocal.pipeline.trace import Trace
from blocklocal.pipeline.wire import DTYPES, TensorSpec, digest

Batch = tuple[Tensor | None, Tensor]


class Pipeline:
    """Trains a learner whose blocks are spread over processes: no rank ever waits for the gradient of another.

    Every rank builds the same learner, makes a pipeline of it and goes through the same minibatches (x, y): all of
    them read y, the rank of block 0 alone reads x. The weights are those of `learner.backward`, to the bit where the
    arithmetic is the same. A learner built on the meta device takes memory on a rank for the rank's own blocks only,
    which then are initialised from `seed`.

    optimizer: makes one from a block's parameters. placement: the rank of each block, by default nearly as many blocks
    on each; `balanced` measures a better one. mesh: with a dimension "block" and, for replicas, "data"; by default all
    processes are one pipeline. data_parallel: what makes replicas of a block, `replicate` (DDP) or `shard` (FSDP2).
    message: dtype of what travels between blocks, by default that of the parameters; a narrower one rounds the outputs
    of all blocks but the last. window: so many minibatches are
    handed in and out at once; a rank is never further ahead of the next one. ahead: so many minibatches early a receive
    is posted. accumulate: the number of minibatches whose mean gradient makes an optimizer step. timeout: seconds after
    which a message that does not come is an error that names rank, block and minibatch; over NCCL the process group's
    own timeout counts. seed: of random draws inside the blocks. trace: record what this rank does when.

    Under torch.autocast, around the whole loop or a part of it, the weights are those of one process too.

    >>> pipeline = Pipeline(learner, optimizer=lambda parameters: SGD(parameters, lr=0.1))
    >>> for losses in pipeline.train(batches):
    ...     print(pipeline.blocks, losses.mean(0))
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
        message: torch.dtype | None = None,
        window: int = 8,
        ahead: int = 2,
        accumulate: int = 1,
        timeout: float = 300.0,
        seed: int = 0,
        trace: bool = False,
    ) -> None:
        if not dist.is_initialized():
            raise ValueError("a pipeline needs processes: call torch.distributed.init_process_group() first")
        require(learner, BlockLocal, name="learner", needed="pass a bll.BlockLocal")
        require_function(optimizer, name="optimizer", needed="pass a function from parameters to an optimizer")
        window = require_whole(window, name="window", least=1)
        ahead = require_whole(ahead, name="ahead", least=1)
        accumulate = require_whole(accumulate, name="accumulate", least=1)
        require_number(timeout, name="timeout", above=0)
        if message is not None and message not in DTYPES:
            raise ValueError(f"message={message!r}: choose {', '.join(map(str, DTYPES))}")
        self.learner, self.device, self.window = learner, torch.device(device), window
        group, replicas = _dimensions(mesh)
        self._replicas = replicas
        self.rank = dist.get_rank(group)
        self.placement = _place(placement, blocks=len(learner.blocks), ranks=dist.get_world_size(group))
        replica = 0 if replicas is None else replicas.get_local_rank()
        self.trace = Trace(rank=dist.get_rank(), replica=replica, device=self.device) if trace else None
        self.minibatches = 0
        """So many minibatches this rank has learnt from."""
        message_type = _message_type(learner, message)
        self.steps = [materialize(LocalStep(learner, k), device=self.device, seed=seed) for k in self.blocks]
        """The blocks of this rank with their borders."""
        for step in self.steps:
            share_feedback(step, False if replicas is None else replicas.get_group())
        self.stages = [
            Stage(
                step if replicas is None else data_parallel(step, replicas),
                k,
                optimizer=_optimizer(optimizer, step),
                message_type=message_type,
                outlet=None if k == len(learner.borders) else _shape(learner, k),
                accumulate=accumulate,
                seed=seed + replica,
                trace=self.trace,
            )
            for k, step in zip(self.blocks, self.steps, strict=True)
        ]

        def specs(k: int) -> list[TensorSpec]:
            return [TensorSpec(_shape(learner, k), message_type.dtype)]

        self._executor = Executor(
            self.stages,
            receives={k: specs(k - 1) for k in self.blocks if self.placement.receives(k)},
            sends={k: specs(k) for k in self.blocks if self.placement.sends(k)},
            rank=self.rank,
            group=group,
            device=self.device,
            window=window,
            prefetch=ahead,
            timeout=timeout,
        )
        self._ahead = ahead

    @property
    def blocks(self) -> list[int]:
        """The blocks of this rank."""
        return self.placement.blocks(self.rank)

    def train(self, batches: Iterable[Batch]) -> Iterator[Tensor]:
        """Learn from minibatches; window by window the local losses (minibatches, blocks of this rank).

        All ranks pass the same number of minibatches. Between two windows every rank has finished the same minibatches,
        though not at the same time: what is saved there by each fits together.
        """
        for results in self._run(batches, training=True):
            self.minibatches += len(results) // len(self.blocks)
            yield torch.stack(results).view(-1, len(self.blocks))

    @torch.no_grad()
    def predict(self, batches: Iterable[Batch]) -> Iterator[Tensor]:
        """Minibatch by minibatch, the predictions (blocks of this rank, B, n) of this rank's exits."""
        for results in self._run(batches, training=False):
            for m in range(0, len(results), len(self.blocks)):
                yield torch.stack(results[m : m + len(self.blocks)])

    @torch.no_grad()
    def diagnose(self, x: Tensor | None, y: Tensor) -> dict[int, dict[str, float]]:
        """What a batch shows of the border behind each block of this rank: see `Border.diagnose`."""
        reports: dict[int, dict[str, float]] = {}

        def look(step: nn.Module, _: object, output: tuple[Tensor, Tensor]) -> None:
            assert isinstance(step, LocalStep)
            if isinstance(step.border, Border):
                reports[step.k] = step.border.diagnose(output[1], y.to(self.device))

        hooks = [step.register_forward_hook(look) for step in self.steps]
        try:
            for _ in self.predict([(x, y)]):
                pass
        finally:
            for hook in hooks:
                hook.remove()
        return reports

    def _run(self, batches: Iterable[Batch], *, training: bool) -> Iterator[list[Tensor]]:
        """Window by window what the stages' `finish` gave. Between two windows others may run in the other mode."""
        remaining = iter(batches)
        self._set_mode(training=training)
        while window := list(islice(remaining, self.window)):
            if self.stages[0].training != training:
                self._set_mode(training=training)
            if training:
                require_gradients("Pipeline.train")
                for _, y in window:
                    self.learner.targets.check(y)
            minibatches = [
                Minibatch(
                    self.minibatches + m,
                    x=self._input(x),
                    y=y.to(self.device, non_blocking=True),
                    digest=digest(y),
                )
                for m, (x, y) in enumerate(window)
            ]
            results = self._executor.run(self._actions(len(window)), minibatches)
            if self.trace and training:
                self.trace.lap("wait", block=self.blocks[-1], minibatch=minibatches[-1].number)
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

    def _actions(self, minibatches: int) -> list[Action]:
        return schedule(self.placement, minibatches=minibatches, ahead=self._ahead)[self.rank]

    def _input(self, x: Tensor | None) -> Tensor | None:
        if self.blocks[0] > 0:
            return None
        if x is None:
            raise ValueError("a minibatch without x: the rank of block 0 reads the inputs")
        return x.to(self.device, non_blocking=True)


def _dimensions(mesh: DeviceMesh | None) -> tuple[dist.ProcessGroup | None, DeviceMesh | None]:
    """The group of one pipeline, and the mesh of the replicas of a block where there are any."""
    if mesh is None:
        return None, None
    names = mesh.mesh_dim_names or ()
    if "block" not in names or not set(names) <= {"block", "data"}:
        raise ValueError(f'mesh with dimensions {names}: a pipeline needs "block", and may have "data"')
    replicas = mesh["data"] if "data" in names and mesh["data"].size() > 1 else None
    return mesh.get_group("block"), replicas


def _place(placement: Placement | Sequence[int] | None, *, blocks: int, ranks: int) -> Placement:
    if placement is None:
        return Placement.even(blocks, ranks=ranks)
    placed = placement if isinstance(placement, Placement) else Placement(tuple(placement))
    if len(placed.ranks) != blocks or placed.size != ranks:
        raise ValueError(f"placement {list(placed.ranks)} is not one of {blocks} blocks on {ranks} ranks")
    return placed


def _message_type(learner: BlockLocal, message: torch.dtype | None) -> MessageType:
    own = next((p.dtype for p in learner.parameters() if p.is_floating_point()), torch.get_default_dtype())
    return MessageType(message or own, rounds=message is not None)


def _optimizer(optimizer: Callable[[list[nn.Parameter]], Optimizer], step: LocalStep) -> Optimizer | None:
    parameters = [parameter for parameter in step.parameters() if parameter.requires_grad]
    if not parameters:
        return None
    made = optimizer(parameters)
    require(made, Optimizer, name="optimizer: what it gives", needed="a torch.optim.Optimizer is needed")
    if not set(stepped_by(made)) & set(map(id, parameters)):
        raise ValueError(f"optimizer= gives one without a parameter of block {step.k}: pass on those that it is given")
    return made


def _shape(learner: BlockLocal, k: int) -> tuple[int, ...]:
    """Of one sample at border k."""
    border = learner.borders[k]
    assert isinstance(border, Border)
    return border.site.shape
