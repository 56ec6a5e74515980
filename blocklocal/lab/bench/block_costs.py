"""What each block of a learner costs in one training step."""

from __future__ import annotations

import time
from functools import partial

from rich.table import Table
from torch import Tensor, nn

from blocklocal import BlockLocal
from blocklocal.memory import MemoryTracker
from blocklocal.operations import operations


def table(learner: BlockLocal, x: Tensor, y: Tensor) -> Table:
    """One row per block; memory and time are those of one training step on the batch, including the border.

    The head's share is that of the forward operations of block and border, in matrix products and convolutions.
    """
    costs = _costs(learner, x, y)
    total = sum(seconds for _, seconds, _ in costs)
    rows = Table("block", "submodules", title=f"one step on {len(x)} images", title_justify="left")
    for column in ("parameters", "border's", "activations", "time", "head"):
        rows.add_column(column, justify="right")
    for k, (kept, seconds, share) in enumerate(costs):
        own = _count(learner.blocks[k])
        rows.add_row(
            str(k),
            ", ".join(submodules(learner.model, learner.blocks[k])),
            f"{own:,}",
            f"{sum(parameter.numel() for parameter in learner.block_parameters(k)) - own:,}",
            f"{kept / 2**20:,.2f} MiB",
            f"{seconds / total:.0%}",
            f"{share:.0%}" if k < len(learner.borders) else "",
        )
    return rows


def submodules(model: nn.Module, block: nn.Module) -> list[str]:
    """Names of the largest submodules of the model whose parameters are all in the block."""
    own = set(block.parameters())
    names: list[str] = []
    for name, module in model.named_modules():
        parameters = set(module.parameters())
        inside = any(name.startswith(f"{whole}.") for whole in names)
        if name and parameters and parameters <= own and not inside:
            names.append(name)
    return names


def _costs(learner: BlockLocal, x: Tensor, y: Tensor, *, repetitions: int = 3) -> list[tuple[int, float, float]]:
    """For every block: the bytes that its forward pass keeps for the backward pass, the seconds of both, and the
    border's share of its operations."""
    costs, h = [], x
    for k in range(len(learner.blocks)):
        with MemoryTracker() as tracker:
            loss, output = learner.local(k, h, y)
        del loss
        seconds = min(_seconds(learner, k, h, y) for _ in range(repetitions))
        own = operations(learner.blocks[k], h.clone())
        whole = operations(partial(learner.local, k, y=y), h)
        costs.append((tracker.alive, seconds, 1 - own / max(whole, 1)))
        h = output
    return costs


def _seconds(learner: BlockLocal, k: int, h: Tensor, y: Tensor) -> float:
    start = time.perf_counter()
    loss, _ = learner.local(k, h, y)
    loss.backward()
    return time.perf_counter() - start


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
