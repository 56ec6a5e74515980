"""What each way to train a model needs in memory: predicted on the meta device, or measured where the model fits.

A prediction runs the same step on tensors that have a shape and no memory, and counts the bytes that are alive, see
`blocklocal.memory`. Weights, gradients and optimizer state are then exact. Activations are those of the operations that
the meta device runs, which for attention are not the fused ones of a CPU or GPU.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from blocklocal import BlockLocal
from blocklocal.lab.bench.baselines import checkpointed
from blocklocal.memory import MemoryTracker
from blocklocal.messages import Criterion, dense

MakeOptimizer = Callable[[list[nn.Parameter]], Optimizer]


@dataclass(frozen=True)
class Need:
    """Bytes that a way to train needs on one device.

    weights: parameters and buffers. gradients: as many as are alive at once. state: of the optimizers. activations: the
    rest of what is alive at the peak of a step: what the backward pass needs, temporaries, and the batch. block: the
    one that is meant, or that needs the most; None for the whole model.
    """

    way: str
    weights: int
    gradients: int
    state: int
    activations: int
    block: int | None = None

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.state + self.activations

    def plain(self) -> dict[str, Any]:
        return asdict(self) | {"total": self.total}


@dataclass(frozen=True)
class Work:
    """A model to train on a batch (x, y), all on one device; on the meta device nothing is computed.

    build: a new model. learner: puts a model into blocks. accumulate: parts of the batch where gradients are
    accumulated.
    """

    build: Callable[[], nn.Module]
    learner: Callable[[nn.Module], BlockLocal]
    optimizer: MakeOptimizer
    criterion: Criterion
    x: Tensor
    y: Tensor
    accumulate: int


def needs(work: Work) -> list[Need]:
    """What each way needs: the whole model by backpropagation, with checkpointing and with accumulation, then blocks:
    all of them, one at a time with the others elsewhere, and each alone on stored activations."""
    whole = [
        _whole("backprop", work, work.build(), batches=1),
        _whole("checkpointing", work, checkpointed(work.build()), batches=1),
        _whole(f"accumulation, {work.accumulate} parts", work, work.build(), batches=work.accumulate),
    ]
    alone = _blocks(work)
    largest = max(alone, key=lambda need: need.gradients + need.activations)
    weights, state = (sum(getattr(need, name) for need in alone) for name in ("weights", "state"))
    together = Need("blocks", weights, largest.gradients, state, largest.activations, largest.block)
    heaviest = max(alone, key=lambda need: need.total)
    offloaded = Need(
        "blocks, offloaded", heaviest.weights, heaviest.gradients, heaviest.state, heaviest.activations, heaviest.block
    )
    return [*whole, together, offloaded, *alone]


def _whole(way: str, work: Work, model: nn.Module, *, batches: int) -> Need:
    """A step of the whole model on the batch, in this number of parts."""
    optimizer = work.optimizer(list(model.parameters()))
    parts = [(x, y) for x, y in zip(work.x.chunk(batches), work.y.chunk(batches), strict=True)]

    def step() -> None:
        for x, y in parts:
            (work.criterion(model(x), y) / batches).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return _need(way, step, model.parameters(), model.buffers(), optimizer, batch=(work.x, work.y))


def _blocks(work: Work) -> list[Need]:
    """A step of each block, on the output of the block before it."""
    learner, h, found = work.learner(work.build()).train(), work.x, []
    for k in range(len(learner.blocks)):
        parts = nn.ModuleList([learner.blocks[k], *learner.borders[k : k + 1]])
        optimizer = work.optimizer(learner.block_parameters(k))

        def step(k: int = k, h: Tensor = h, optimizer: Optimizer = optimizer) -> None:
            _loss(learner, k, h, work).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        need = _need("one block", step, parts.parameters(), parts.buffers(), optimizer, batch=(h, work.y), block=k)
        found.append(need)
        with torch.no_grad():
            h = dense(learner.blocks[k](h))
    return found


def _loss(learner: BlockLocal, k: int, h: Tensor, work: Work) -> Tensor:
    """What `BlockLocal.local` computes, which refuses to do it on the meta device."""
    if not h.is_meta:
        return learner.local(k, h, work.y)[0]
    output = learner.blocks[k](h)
    if k == len(learner.borders):
        return work.criterion(output, work.y)
    border: Any = learner.borders[k]
    return border(border.message(output), work.y)


def _need(
    way: str,
    step: Callable[[], None],
    parameters: Iterable[nn.Parameter],
    buffers: Iterable[Tensor],
    optimizer: Optimizer,
    *,
    batch: Sequence[Tensor],
    block: int | None = None,
) -> Need:
    own = list(parameters)
    step()  # makes the optimizer's state
    gc.collect()
    with MemoryTracker() as tracker:
        step()
    state = [value for kept in optimizer.state.values() for value in kept.values() if isinstance(value, Tensor)]
    gradients = _bytes(parameter for parameter in own if parameter.requires_grad)
    activations = tracker.timeline.peak - gradients + _bytes(batch)
    return Need(way, _bytes([*own, *buffers]), gradients, _bytes(state), activations, block)


def _bytes(tensors: Iterable[Tensor]) -> int:
    """The bytes of these tensors; memory that several share counts once."""
    storages = {id(storage): storage for tensor in tensors for storage in [tensor.untyped_storage()]}
    return sum(storage.nbytes() for storage in storages.values())
