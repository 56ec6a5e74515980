"""`bll merge`: puts blocks that were trained alone together into a whole run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import FlagCreatePairsOff, Positional, arg

from blocklocal.lab.arguments import parse
from blocklocal.lab.errors import UserError
from blocklocal.lab.one_block.merging import chain_of, load_chain, save_chain
from blocklocal.lab.training.recipes import refuse_code
from blocklocal.lab.training.record import summary


@dataclass(frozen=True)
class Options:
    """Put the blocks that bll train --only has trained together, one folder for each block, into a run for bll eval,
    report and sample. It is tested on the data.

    Each block must have been trained on a cache that was made by exactly the blocks before it.
    """

    runs: Annotated[Positional[tuple[Path, ...]], arg(metavar="RUN_0 RUN_1 ...")]
    """folders of all blocks, in any order"""
    out: Path
    """folder of the whole run"""
    data: str | None = None
    """another location of the same data set"""
    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda, ..."""
    trust: Annotated[bool, FlagCreatePairsOff] = False
    """run the code of the model package.module:function that the blocks name"""


def main(args: Sequence[str]) -> None:
    options = parse(Options, args, prog="bll merge")
    if not options.runs:
        raise UserError("name the folders of all blocks: bll merge RUN_0 RUN_1 ... --out RUN")
    chain = chain_of(options.runs)
    if not options.trust:
        refuse_code(chain.settings, run=chain.runs[0].path)
    experiment = load_chain(chain, data=options.data, device=options.device)
    records = save_chain(chain, experiment, options.out)
    print(json.dumps({**summary(records, experiment), "out": str(options.out)}))
