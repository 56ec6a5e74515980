"""`bll train`: a network, in blocks or as a whole, or with --only one block of it."""

from __future__ import annotations

import importlib
from collections.abc import Sequence

from blocklocal.lab.training import run

ONLY = "--only"


def main(args: Sequence[str]) -> None:
    if any(arg.partition("=")[0] == ONLY for arg in args):  # imported only here, since few need it
        importlib.import_module("blocklocal.lab.one_block.run").main(args)
    else:
        run.main(args)
