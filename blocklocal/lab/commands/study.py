"""`bll study`: accuracy against cost, over a grid of settings and several seeds."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated

from tyro.conf import FlagCreatePairsOff, Positional, Suppress, arg

from blocklocal.lab.arguments import parse
from blocklocal.lab.bench import step_cost
from blocklocal.lab.bench.step_cost import Cost
from blocklocal.lab.errors import UserError
from blocklocal.lab.outputs import room
from blocklocal.lab.ranges import Range
from blocklocal.lab.runs.folder import Run
from blocklocal.lab.runs.history import History, read
from blocklocal.lab.settings import Settings, folder_name, last_name
from blocklocal.lab.sweeps import pareto
from blocklocal.lab.sweeps.grid import Row, read_grid
from blocklocal.lab.sweeps.sweep import complete
from blocklocal.lab.terminal import Terminal
from blocklocal.lab.training.recipes import recipe

SEEDS = 1000
BACKGROUND = "--background"


@dataclass(frozen=True)
class Options(Settings):
    """Train every row of a grid with several seeds, and lay accuracy beside what a training step costs.

    GRID is a file with a plain Python list, each item the settings of a row: [{"rule": "bp"}, {"head": "pooled"}, ...].
    Costs are measured first, all rows in turn in one process, as ratios to the first row of rule bp. Backpropagation
    with the epochs that the time of the other rows buys is added. Rows are chosen by the validation images, and the
    test images are looked at for the last table alone. The same command goes on where it was stopped.
    """

    grid: Annotated[Positional[Path], arg(metavar="GRID")] = Path()
    """file with the list of settings"""
    data: str = "digits"
    """digits, fashion_mnist, cifar10, cifar100, hf:OWNER/NAME, or a folder of Parquet files or of images"""
    resume: Suppress[bool] = False
    trust: Suppress[bool] = False
    seeds: Annotated[int, Range(least=1, most=SEEDS)] = 3
    """runs of every row: the first with --seed, each further one with one more"""
    equal_time: bool = True
    """add rows of backpropagation with the epochs that the time of the other rows buys"""
    show: Annotated[bool, FlagCreatePairsOff] = False
    """train nothing: show what is there"""
    background: Annotated[bool, FlagCreatePairsOff] = False
    """go on without the terminal, with a log in the folder"""
    out: str | None = None
    """folder of all runs (default: runs/study-GRID-DATA)"""

    @property
    def home(self) -> Path:
        return Path(self.out or Path("runs", folder_name("study", self.grid.stem, self.data)))

    def rows(self) -> list[Row]:
        """UserError: no grid of settings, or such as a run cannot have."""
        if self.grid == Path():
            raise UserError("GRID is missing: name the file that holds the list of settings")
        if not self.validation:
            raise UserError("--validation is needed: so many training images are held out, by which rows are chosen")
        rows = read_grid(self.grid, shared=self.shared)
        for row in rows:
            row.settings.check()
            row.settings.check_alone()
        return rows

    def runs(self, row: Row) -> list[Settings]:
        """One with each seed."""
        return [
            replace(row.settings, seed=seed, out=str(self.home / folder_name(row.name, f"seed{seed}")))
            for seed in range(self.seed, self.seed + self.seeds)
        ]


def main(args: Sequence[str]) -> None:
    unhelped = [arg for arg in args if arg not in ("-h", "--help")]
    data = parse(Options, unhelped, prog="bll study", default=_default("digits")).data
    options = parse(Options, args, prog="bll study", default=_default(data))
    rows = options.rows()
    with room(options.home, flag="--out"):
        if options.background:
            _leave(options, [arg for arg in args if arg != BACKGROUND])
            return
        _study(options, rows)


def _study(options: Options, rows: list[Row]) -> None:
    options.home.mkdir(parents=True, exist_ok=True)
    with Terminal(stderr=True).status("measuring") as status:
        found = step_cost.costs(
            {row.name: row.settings for row in rows},
            file=options.home / "costs.json",
            watch=lambda what: status.update(f"measuring {what}"),
        )
    if options.equal_time:
        rows, found = _with_equal_time(rows, found)
    by_seed = [options.runs(row) for row in rows]
    series = [runs[k] for k in range(options.seeds) for runs in by_seed]
    if not options.show:
        complete(series, folder=options.home, console=Terminal(stderr=True))
    points = [
        pareto.point(row.name, done, cost=found[row.name])
        for row, runs in zip(rows, by_seed, strict=True)
        if (done := _finished(runs))
    ]
    if points:
        title = f"{last_name(options.data)}, {options.grid.stem}"
        pareto.print_table(points, title=title)
        pareto.draw(points, options.home, title=title)
    missing = len(series) - sum(point.runs for point in points)
    print(json.dumps({"out": str(options.home), "missing": missing, "rows": [asdict(point) for point in points]}))
    if missing and not options.show:
        raise UserError(f"{missing} of {len(series)} runs failed; the same command tries them again")


def _with_equal_time(rows: list[Row], found: dict[str, Cost]) -> tuple[list[Row], dict[str, Cost]]:
    """With backpropagation for as long as the others take: its epochs times their time, in whole epochs."""
    bp = next(row for row in rows if row.settings.rule == "bp")
    planned = {
        (row.settings.epochs, round(row.settings.epochs * found[row.name].time)) for row in rows if row is not bp
    }
    longer = sorted({epochs for own, epochs in planned if epochs > max(own, bp.settings.epochs)})
    added = [Row(f"{bp.name}, {epochs} epochs", replace(bp.settings, epochs=epochs)) for epochs in longer]
    cost = found[bp.name]
    scaled = {
        row.name: replace(
            cost,
            time=cost.time * row.settings.epochs / bp.settings.epochs,
            operations=cost.operations * row.settings.epochs / bp.settings.epochs,
        )
        for row in added
    }
    return [*rows, *added], {**found, **scaled}


def _finished(runs: Sequence[Settings]) -> list[History]:
    return [run for settings in runs if Run(settings.folder).exists and (run := read(settings.folder)).finished]


def _leave(options: Options, args: Sequence[str]) -> None:
    """Begin the same command in a session of its own."""
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
    print(f"process {process.pid} goes on in the background and writes {log}; stop it with: kill {process.pid}")


def _default(data: str) -> Options:
    return Options(**asdict(recipe(data)))
