"""A study of the rows of a grid with several seeds: costs, runs, and accuracy against cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from blocklocal.lab.bench import step_cost
from blocklocal.lab.bench.step_cost import Cost
from blocklocal.lab.runs.folder import Run
from blocklocal.lab.runs.history import History, read
from blocklocal.lab.settings import Settings, folder_name
from blocklocal.lab.sweeps import pareto
from blocklocal.lab.sweeps.grid import Row
from blocklocal.lab.sweeps.sweep import complete
from blocklocal.lab.terminal import Terminal


def study(
    rows: list[Row], *, seeds: Sequence[int], folder: Path, title: str, equal_time: bool, train: bool
) -> dict[str, Any]:
    """Measure the cost of a step of each row, train what is missing, and draw accuracy against cost.

    equal_time: add rows of backpropagation, see `with_equal_time`. train: if False, only show the results so far.
    Returns what `bll study` prints as its last line.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with Terminal(stderr=True).status("measuring") as status:
        found = step_cost.costs(
            {row.name: row.settings for row in rows},
            file=folder / "costs.json",
            watch=lambda what: status.update(f"measuring {what}"),
        )
    if equal_time:
        rows, found = with_equal_time(rows, found)
    by_seed = [[_run(row, seed, folder=folder) for seed in seeds] for row in rows]
    sweep = [runs[k] for k in range(len(seeds)) for runs in by_seed]
    if train:
        complete(sweep, folder=folder, console=Terminal(stderr=True))
    points = [
        pareto.point(row.name, done, cost=found[row.name])
        for row, runs in zip(rows, by_seed, strict=True)
        if (done := _complete(runs))
    ]
    if points:
        pareto.print_table(points, title=title)
        pareto.draw(points, folder, title=title)
    missing = len(sweep) - sum(point.runs for point in points)
    return {"out": str(folder), "runs": len(sweep), "missing": missing, "rows": [point.plain() for point in points]}


def _run(row: Row, seed: int, *, folder: Path) -> Settings:
    return replace(row.settings, seed=seed, out=str(folder / folder_name(row.name, f"seed{seed}")))


def with_equal_time(rows: list[Row], found: dict[str, Cost]) -> tuple[list[Row], dict[str, Cost]]:
    """Add backpropagation for as long as the other rows take: its epochs times their time, in whole epochs."""
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


def _complete(runs: Sequence[Settings]) -> list[History]:
    return [run for settings in runs if Run(settings.folder).exists and (run := read(settings.folder)).complete]
