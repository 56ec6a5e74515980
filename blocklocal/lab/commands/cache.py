"""`bll cache`: stores the activations behind a block that was trained alone, for the next block."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import FlagCreatePairsOff, Positional, arg

from blocklocal.lab.arguments import parse
from blocklocal.lab.errors import UserError
from blocklocal.lab.one_block.activations import Activations
from blocklocal.lab.one_block.planning import load_block, plan_contents
from blocklocal.lab.one_block.writing import check_room, gib, missing, write
from blocklocal.lab.ranges import Range
from blocklocal.lab.runs.lock import alone


@dataclass(frozen=True)
class Options:
    """Store what a trained block makes of the samples: what the next block is trained on, without the blocks before it.

    The size is said and asked for before anything is written. The same command again completes a cache that was
    interrupted.
    """

    run: Annotated[Positional[Path], arg(metavar="RUN")]
    """folder of bll train --only"""
    out: Path | None = None
    """folder of the cache (default: RUN-cache)"""
    from_: Annotated[Path | None, arg(name="from")] = None
    """the cache that the block itself has read, if it is no longer where it was"""
    data: str | None = None
    """for block 0: another location of the same data set"""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """precision of the stored activations; bf16 takes half the space, and is not exact"""
    views: Annotated[int, Range(least=0)] = 0
    """number of epochs whose samples are stored as they are drawn and augmented there; later epochs use them again (0:
    one, or as many as the cache that the block has read)"""
    yes: Annotated[bool, FlagCreatePairsOff] = False
    """write without asking"""
    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda, ..."""
    trust: Annotated[bool, FlagCreatePairsOff] = False
    """run the code of the model package.module:function that the run names"""


def main(args: Sequence[str]) -> None:
    options = parse(Options, args, prog="bll cache")
    out = options.out or options.run.with_name(f"{options.run.name}-cache")
    block = load_block(
        options.run, upstream=options.from_, data=options.data, device=options.device, trust=options.trust
    )
    contents = plan_contents(block, dtype=options.dtype, views=options.views)
    left = missing(out, contents)
    size = sum(shard.samples for shard in left) * contents.sample_bytes
    free = check_room(out, size)
    if left and not options.yes:
        _ask(
            f"{gib(size)} in {len(left)} files for {str(out)!r}, {contents.views} views of "
            f"{contents.parts[0].samples:,} training samples; {gib(free)} are free"
        )
    with alone(out):
        write(out, contents, block.experiment, block.source)
    cache = Activations(out)
    print(
        json.dumps(
            {"border": contents.border, "views": contents.views, "bytes": contents.bytes, "digest": cache.digest}
            | {"out": str(out)}
        )
    )


def _ask(what: str) -> None:
    """UserError: nobody is there to answer, or the answer is no."""
    if not sys.stdin.isatty():
        raise UserError(f"{what}: add --yes to write them")
    print(f"{what}. Write them? [y/N] ", end="", file=sys.stderr, flush=True)
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise UserError("nothing was written")
