"""The table of a report: mean, standard deviation and difference to backpropagation for groups of runs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from statistics import mean, stdev
from typing import Any

from rich.table import Table

from blocklocal.lab.names import NAME, sentence, short
from blocklocal.lab.report.seed_groups import Group
from blocklocal.lab.runs.history import History
from blocklocal.lab.settings import last_name
from blocklocal.lab.tasks.measure import ACCURACY, LOSS, MEASURES, RMSE, Measure
from blocklocal.lab.terminal import Terminal

# Mean and standard deviation of accuracy, by (data set, rule).
Reference = Mapping[tuple[str, str], tuple[float, float]]


@dataclass(frozen=True)
class Result:
    """What the runs of a group have come to in one measure; standard deviations (n - 1) need two runs.

    mean, std: of the last exit. all_mean: of all exits combined. to_bp: difference of the means to the runs of rule bp
    with otherwise equal settings, if there are any. stderr: its standard error √(s₁²/n₁ + s₂²/n₂).
    """

    mean: float
    std: float | None
    all_mean: float
    to_bp: float | None
    stderr: float | None


NOTHING = dict.fromkeys(("mean", "std", "all_mean", "to_bp", "stderr"))


@dataclass(frozen=True)
class Row:
    """The results of a group, by the names of its measures: accuracies are fractions of the test samples.

    seconds: mean training time of a run. peak_memory_mib: the largest. epochs: trained, of `epochs_planned`. paper: the
    reference's mean and standard deviation.
    """

    dataset: str
    model: str
    rule: str
    variant: str
    blocks: int
    epochs: int
    epochs_planned: int
    runs: int
    runs_planned: int
    seeds: tuple[int, ...]
    results: Mapping[str, Result]
    seconds: float
    peak_memory_mib: float
    paper: tuple[float, float] | None

    def plain(self) -> dict[str, Any]:
        """As plain values, results as accuracy_mean and so on; null where the measure is not that of the runs."""
        row = asdict(self)
        results = row.pop("results")
        for measure in MEASURES:
            for name, value in results.get(measure.name, NOTHING).items():
                row[_PLAIN.get((measure.name, name), f"{measure.name}_{name}")] = value
        return row


_PLAIN = {("accuracy", "to_bp"): "difference_to_bp", ("accuracy", "stderr"): "difference_stderr"}


def summarise(groups: Sequence[Group], *, reference: Reference | None = None) -> list[Row]:
    """A row for every group that has finished an epoch."""
    return [_row(group, groups, reference=reference or {}) for group in groups if group.counted]


def print_table(rows: Sequence[Row], *, title: str) -> None:
    """Print the rows to standard output, with full width if it is not a terminal."""
    console = Terminal()
    if not console.is_terminal:
        console.width = 140
    columns = tabulate(rows)
    table = Table(title=sentence(title), title_justify="left")
    for name in columns:
        table.add_column(name, justify="left" if name in TEXT else "right")
    for k, row in enumerate(rows):
        ends = k + 1 < len(rows) and rows[k + 1].dataset != row.dataset
        table.add_row(*(cells[k] for cells in columns.values()), end_section=ends)
    console.print(table)


TEXT = ("data", "model", "rule", "variant")


def tabulate(rows: Sequence[Row]) -> dict[str, list[str]]:
    """The columns by heading, without empty ones. `TEXT` names those that hold text."""
    accuracy = _results(ACCURACY, ("accuracy %", "− BP", "all exits %"), rows)
    columns = {
        "data": [short(row.dataset) for row in rows],
        "model": [short(row.model) for row in rows],
        "rule": [row.rule for row in rows],
        "variant": [short(row.variant, longest=4 * NAME) for row in rows],
        **_results(RMSE, ("RMSE", "RMSE − BP", "all exits RMSE"), rows),
        **_results(LOSS, ("nats", "nats − BP", "all exits nats"), rows),
        "accuracy %": accuracy["accuracy %"],
        "paper": ["" if row.paper is None else f"{100 * row.paper[0]:.1f} ± {100 * row.paper[1]:.2f}" for row in rows],
        **accuracy,
        "runs": [_of(row.runs, row.runs_planned) for row in rows],
        "epochs": [_of(row.epochs, row.epochs_planned) for row in rows],
        "blocks": [str(row.blocks) for row in rows],
        "seconds": [f"{row.seconds:,.0f}" if row.seconds >= 10 else f"{row.seconds:.1f}" for row in rows],
        "MiB": [f"{row.peak_memory_mib:,.0f}" for row in rows],
    }
    whole = {"data": {row.dataset for row in rows}, "model": {row.model for row in rows}}
    said = [name for name, names in whole.items() if len(names) == 1]  # the title says it
    return {name: column for name, column in columns.items() if any(column) and name not in said}


def _row(group: Group, groups: Sequence[Group], *, reference: Reference) -> Row:
    settings, runs = group.settings, group.counted
    whole = next((other for other in groups if other.settings.rule == "bp" and group.matches(other)), None)
    others = whole.counted if whole is not None and whole is not group else ()
    return Row(
        dataset=group.dataset,
        model=last_name(settings.model),
        rule=settings.rule,
        variant=group.variant,
        blocks=group.blocks,
        epochs=min(len(run.records) for run in runs),
        epochs_planned=settings.epochs,
        runs=len(runs),
        runs_planned=len(group.runs),
        seeds=tuple(run.settings.seed for run in runs),
        results={measure.name: _result(measure, runs, others) for measure in group.measures},
        seconds=mean(run.seconds for run in runs),
        peak_memory_mib=max(run.peak_memory for run in runs),
        paper=reference.get((group.dataset, settings.rule)),
    )


def _result(measure: Measure, runs: Sequence[History], others: Sequence[History]) -> Result:
    """others: the runs of backpropagation, if any."""
    ours, theirs = ([measure.exit(run.records[-1]) for run in some] for some in (runs, others))
    difference, stderr = _difference(ours, theirs)
    together = mean(measure.combined(run.records[-1]) for run in runs)
    return Result(mean(ours), _deviation(ours), together, difference, stderr)


def _results(measure: Measure, headings: tuple[str, str, str], rows: Sequence[Row]) -> dict[str, list[str]]:
    """The columns of a measure: result, difference to backpropagation, all exits combined."""
    cells: list[tuple[str, str, str]] = []
    for row in rows:
        found = row.results.get(measure.name)
        if found is None:
            cells.append(("", "", ""))
            continue
        shown = partial(measure.show, finer=1, like=found.mean)
        difference = "" if found.to_bp is None else shown(found.to_bp, found.stderr, sign="+")
        together = shown(found.all_mean) if row.blocks > 1 else ""
        cells.append((shown(found.mean, found.std), difference, together))
    return {heading: [cell[i] for cell in cells] for i, heading in enumerate(headings)}


def _difference(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float | None, float | None]:
    """The difference of the means, and its standard error for unequal variances (Welch); None without theirs."""
    if not theirs:
        return None, None
    deviations = _deviation(ours), _deviation(theirs)
    if deviations[0] is None or deviations[1] is None:
        return mean(ours) - mean(theirs), None
    error = math.sqrt(deviations[0] ** 2 / len(ours) + deviations[1] ** 2 / len(theirs))
    return mean(ours) - mean(theirs), error


def _deviation(values: Sequence[float]) -> float | None:
    return stdev(values) if len(values) > 1 else None


def _of(done: int, planned: int) -> str:
    return str(done) if done == planned else f"{done} of {planned}"
