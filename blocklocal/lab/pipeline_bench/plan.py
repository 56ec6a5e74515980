"""`bll blocks --plan`: how to place the blocks of a model on several ranks, and the simulated time."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Literal

from rich.table import Table
from torch import Tensor

from blocklocal import BlockLocal
from blocklocal.lab.errors import UserError
from blocklocal.lab.pipeline_bench.options import MESSAGES
from blocklocal.lab.pipeline_bench.predict import Predictions, measure, predict
from blocklocal.lab.terminal import Terminal
from blocklocal.pipeline.analysis.simulator import Link

RATE = re.compile(r"(\d+(?:\.\d+)?)(kbit|mbit|gbit)?(?:,(\d+(?:\.\d+)?)(?:ms)?)?", re.ASCII)
UNITS = {"kbit": 1e3, "mbit": 1e6, "gbit": 1e9}


def show(
    learner: BlockLocal,
    x: Tensor,
    y: Tensor,
    *,
    names: Sequence[str],
    ranks: int,
    speeds: Sequence[float],
    link: str,
    message_dtype: Literal["fp32", "bf16"],
) -> None:
    """Measure, predict and print. names: of what is in each block. speeds: of the ranks; if empty, all are 1.

    UserError: as for `check`.
    """
    check(blocks=len(learner.blocks), ranks=ranks, speeds=speeds, link=link)
    predictions = predict(
        measure(learner, x, y, ranks=ranks, message=MESSAGES[message_dtype]),
        speeds=speeds or (1.0,) * ranks,
        link=parse_link(link),
    )
    console = Terminal()
    console.print(placement_table(predictions, names=names, title=f"one step on {len(x)} images, on {ranks} ranks"))
    console.print(predictions_table(predictions))
    console.print(advice(predictions), soft_wrap=True)


def check(*, blocks: int, ranks: int, speeds: Sequence[float], link: str) -> None:
    """Check the options. UserError: more ranks than blocks, a wrong number of speeds, an invalid link."""
    parse_link(link)
    if not 1 <= ranks <= blocks:
        raise UserError(f"--plan {ranks}: 1 to {blocks}, since every rank needs one of the {blocks} blocks (--blocks)")
    if speeds and len(speeds) != ranks:
        given = " ".join(f"{speed:g}" for speed in speeds)
        raise UserError(f"--speeds {given}: write a number above 0 for each of {ranks} ranks")


def parse_link(text: str) -> Link:
    """Parse a link such as 100mbit or 100mbit,0.5ms, by default in Mbit/s and ms; if empty, messages take no time."""
    if not text:
        return Link()
    parts = RATE.fullmatch(text)
    if parts is None or not 0 < float(parts[1]) < math.inf or float(parts[3] or 0) == math.inf:
        raise UserError(f"--link {text!r}: write the rate and, where it counts, the latency: 100mbit or 1gbit,0.5ms")
    bits = float(parts[1]) * UNITS[parts[2] or "mbit"]
    return Link(latency=float(parts[3] or 0) / 1e3, bandwidth=bits / 8)


def placement_table(predictions: Predictions, *, names: Sequence[str], title: str) -> Table:
    """One row per block, with its rank if all ranks are used."""
    rows = Table("block", "submodules", title=title, title_justify="left")
    for column in ("forward", "backward", "output", "rank"):
        rows.add_column(column, justify="right", no_wrap=True)
    ranks = predictions.placements[-1].ranks
    for k, (name, block, rank) in enumerate(zip(names, predictions.costs.local, ranks, strict=True)):
        passes = (f"{1e3 * seconds:.1f} ms" for seconds in (block.forward, block.backward + block.update))
        rows.add_row(str(k), name, *passes, f"{block.message / 2**20:,.2f} MiB", str(rank))
    return rows


def predictions_table(predictions: Predictions) -> Table:
    """One row per way of training, with the speed-up over backpropagation in one process."""
    rows = Table("predicted")
    for column in ("ms per minibatch", "speed-up"):
        rows.add_column(column, justify="right")
    local = {f"block-local, ranks: {n}": seconds for n, seconds in enumerate(predictions.block_local, start=1)}
    for name, seconds in ({"backpropagation, alone": predictions.alone} | local | predictions.others).items():
        rows.add_row(name, f"{1e3 * seconds:.1f}", f"{predictions.alone / seconds:.2f}")
    return rows


def advice(predictions: Predictions) -> str:
    """Which placement to use, what limits it, and what is predicted to be faster, in one line."""
    seconds, placement = predictions.block_local[predictions.best], predictions.placements[predictions.best]
    work = predictions.work(placement)
    messages = [(predictions.link.seconds(block.message), k) for k, block in enumerate(predictions.costs.local)]
    longest, border = max(((taken, k) for taken, k in messages if placement.sends(k)), default=(0.0, 0))
    if longest > max(work):
        limit = f"the link, {1e3 * longest:.1f} ms for the output of block {border} (work: {1e3 * max(work):.1f} ms)"
    else:
        mean = sum(work) / len(work)
        limit = f"rank {work.index(max(work))}, {1e3 * max(work):.1f} ms of work (mean: {1e3 * mean:.1f} ms)"
    ways = {"backpropagation, alone": predictions.alone} | predictions.others
    faster = [name for name, other in ways.items() if other < seconds]
    return (
        f"advice: placement={list(placement.ranks)}, {predictions.alone / seconds:.2f} times as fast as "
        f"backpropagation alone; what limits it is {limit}"
        + (f"; predicted to be faster: {', '.join(faster)}" if faster else "")
    )
