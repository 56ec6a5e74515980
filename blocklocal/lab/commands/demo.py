"""`bll demo`: four local blocks compared with end-to-end backpropagation, on the same model and digits."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

from rich.table import Table

from blocklocal.lab.arguments import parse
from blocklocal.lab.bench.step_cost import step_memory
from blocklocal.lab.ranges import Range
from blocklocal.lab.runs.folder import Run
from blocklocal.lab.runs.lock import alone
from blocklocal.lab.terminal import Terminal
from blocklocal.lab.training.recipes import DIGITS
from blocklocal.lab.training.run import train

SETTINGS = replace(DIGITS, validation=142)  # a tenth of the training images, for weighting the exits
RULES = {"bll": "4 blocks, each with its own loss", "bp": "end-to-end backpropagation"}


@dataclass(frozen=True)
class Options:
    """Train the same small network on 1,300 handwritten digits twice: in four local blocks, and by backpropagation."""

    epochs: Annotated[int, Range(least=1)] = DIGITS.epochs
    """passes over the training images"""
    seed: Annotated[int, Range(least=0, most=2**63 - 1)] = 0
    """seed of initial weights, order and augmentation"""
    out: Path | None = None
    """folder of both runs (default: runs/demo-DATE-TIME)"""


def main(args: Sequence[str]) -> None:
    options = parse(Options, args, prog="bll demo")
    folder = options.out or Path("runs", time.strftime("demo-%Y%m%d-%H%M%S"))
    table = Table("rule", "what learns", title=f"{DIGITS.model} on {DIGITS.data}", title_justify="left")
    for column in ("test accuracy", "all exits", "training", "memory"):
        table.add_column(column, justify="right")
    with alone(folder):
        for rule in RULES:
            Run(folder / rule).refuse()
        for rule, text in RULES.items():
            settings = replace(SETTINGS, rule=rule, epochs=options.epochs, seed=options.seed, out=str(folder / rule))
            result, alive = train(settings), step_memory(settings)
            combined = f"{result['accuracy_all']:.2%}" if result["blocks"] > 1 else ""
            figures = f"{result['accuracy']:.2%}", combined, f"{result['seconds']:.1f} s", f"{alive / 2**20:.1f} MiB"
            table.add_row(rule, text, *figures)
    console = Terminal()
    console.print(table)
    console.print("memory: the most that a step keeps alive, without weights", style="dim")
    bll = "bll" if shutil.which("bll") else sys.argv[0]  # as it was called
    console.print(f"The runs are in {folder}. Next: {bll} eval {folder}/bll --exit 0.9", soft_wrap=True)
