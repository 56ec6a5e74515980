"""`bll study`: accuracy against cost over a grid of settings, with several seeds."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import FlagCreatePairsOff, Positional, Suppress, arg

from blocklocal.lab.arguments import parse
from blocklocal.lab.errors import UserError
from blocklocal.lab.outputs import room
from blocklocal.lab.ranges import Range
from blocklocal.lab.settings import Settings, folder_name, last_name
from blocklocal.lab.sweeps.grid import Row, read_grid
from blocklocal.lab.sweeps.study import study
from blocklocal.lab.sweeps.sweep import MOST_SEEDS
from blocklocal.lab.training.recipes import recipe

BACKGROUND = "--background"


@dataclass(frozen=True)
class Options(Settings):
    """Train every row of a grid with several seeds, and compare accuracy with the cost of a training step.

    GRID is a file with a plain Python list, each item the settings of a row: [{"rule": "bp"}, {"head": "pooled"}, ...].
    Costs are measured first, all rows in turn in one process, as ratios to the first row of rule bp. Rows of
    backpropagation are added that train for as long as the other rows. Rows are chosen by the validation images; the
    test images are used only for the final table. The same command continues where it was stopped.
    """

    grid: Annotated[Positional[Path], arg(metavar="GRID")] = Path()
    """file with the list of settings"""
    data: str = "digits"
    """digits, fashion_mnist, cifar10, cifar100, hf:OWNER/NAME, or a folder of Parquet files or of images"""
    resume: Suppress[bool] = False
    trust: Suppress[bool] = False
    seeds: Annotated[int, Range(least=1, most=MOST_SEEDS)] = 3
    """runs of every row: the first with --seed, each further one with the next seed"""
    equal_time: bool = True
    """add rows of backpropagation that train for as long as the other rows"""
    show: Annotated[bool, FlagCreatePairsOff] = False
    """train nothing, and show the results so far"""
    background: Annotated[bool, FlagCreatePairsOff] = False
    """continue without the terminal, with a log in the folder"""
    out: str | None = None
    """folder of all runs (default: runs/study-GRID-DATA)"""

    @property
    def home(self) -> Path:
        return Path(self.out or Path("runs", folder_name("study", self.grid.stem, self.data)))

    def rows(self) -> list[Row]:
        """The rows of the grid. UserError: not a grid of settings, or settings that a run cannot have."""
        if self.grid == Path():
            raise UserError("GRID is missing: name the file that holds the list of settings")
        if not self.validation:
            raise UserError("--validation is missing: give the number of held-out training images for choosing rows")
        rows = read_grid(self.grid, shared=self.shared)
        for row in rows:
            row.settings.check()
            row.settings.check_alone()
        return rows


def main(args: Sequence[str]) -> None:
    unhelped = [arg for arg in args if arg not in ("-h", "--help")]
    data = parse(Options, unhelped, prog="bll study", default=_default("digits")).data
    options = parse(Options, args, prog="bll study", default=_default(data))
    rows = options.rows()
    with room(options.home, flag="--out"):
        if options.background:
            _leave(options, [arg for arg in args if arg != BACKGROUND])
            return
        found = study(
            rows,
            seeds=range(options.seed, options.seed + options.seeds),
            folder=options.home,
            title=f"{last_name(options.data)}, {options.grid.stem}",
            equal_time=options.equal_time,
            train=not options.show,
        )
    print(json.dumps(found))
    if found["missing"] and not options.show:
        raise UserError(f"{found['missing']} of {found['runs']} runs failed; the same command tries them again")


def _leave(options: Options, args: Sequence[str]) -> None:
    """Start the same command in a session of its own."""
    options.home.mkdir(parents=True, exist_ok=True)
    log = options.home / "study.log"
    with log.open("ab") as said:
        process = subprocess.Popen(
            [sys.executable, "-m", "blocklocal", "study", *args],
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=said,
            start_new_session=True,
        )
    print(f"process {process.pid} continues in the background and writes {log}; stop it with: kill {process.pid}")


def _default(data: str) -> Options:
    return Options(**asdict(recipe(data)))
