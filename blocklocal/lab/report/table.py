"""The table of a report: mean, standard deviation and difference to backpropagation for groups of runs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, stdev

from rich.table import Table

from blocklocal.lab.names import NAME, sentence, short
from blocklocal.lab.report.measure import LOSS, measure_of
from blocklocal.lab.report.seed_groups import Group
from blocklocal.lab.runs.history import History
from blocklocal.lab.settings import last_name
from blocklocal.lab.terminal import Terminal

# Mean and standard deviation of accuracy, by (data set, rule).
Reference = Mapping[tuple[str, str], tuple[float, float]]


@dataclass(frozen=True)
class Row:
    """The results of a group. Accuracies are fractions of the test images; standard deviations (n - 1) need two runs.

    accuracy_mean, _std: of the last exit. accuracy_all_mean: of all exits combined. seconds: mean training time of a
    run. peak_memory_mib: the largest. difference_to_bp: difference of the means to the runs of rule bp with otherwise
    equal settings, with its standard error √(s₁²/n₁ + s₂²/n₂). loss_mean, _std, loss_all_mean, loss_to_bp,
    loss_stderr: the same of the cross-entropy in nats, for text alone. epochs: trained, of `epochs_planned`. paper: the
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
    accuracy_mean: float
    accuracy_std: float | None
    accuracy_all_mean: float
    seconds: float
    peak_memory_mib: float
    difference_to_bp: float | None
    difference_stderr: float | None
    loss_mean: float | None
    loss_std: float | None
    loss_all_mean: float | None
    loss_to_bp: float | None
    loss_stderr: float | None
    paper: tuple[float, float] | None


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
    columns = {
        "data": [short(row.dataset) for row in rows],
        "model": [short(row.model) for row in rows],
        "rule": [row.rule for row in rows],
        "variant": [short(row.variant, longest=4 * NAME) for row in rows],
        "nats": [_nats(row.loss_mean, row.loss_std) for row in rows],
        "nats − BP": [_nats(row.loss_to_bp, row.loss_stderr, sign="+") for row in rows],
        "all exits nats": [_nats(row.loss_all_mean) if row.blocks > 1 else "" for row in rows],
        "accuracy %": [_percent(row.accuracy_mean, row.accuracy_std) for row in rows],
        "paper": ["" if row.paper is None else f"{100 * row.paper[0]:.1f} ± {100 * row.paper[1]:.2f}" for row in rows],
        "− BP": [_percent(row.difference_to_bp, row.difference_stderr, sign="+") for row in rows],
        "all exits %": [_percent(row.accuracy_all_mean) if row.blocks > 1 else "" for row in rows],
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
    by_loss = measure_of(settings) is LOSS
    accuracies, losses = _accuracies(runs), _losses(runs) if by_loss else []
    whole = next((other for other in groups if other.settings.rule == "bp" and group.matches(other)), None)
    others = whole.counted if whole is not None and whole is not group else ()
    difference, stderr = _difference(accuracies, _accuracies(others))
    loss_difference, loss_stderr = _difference(losses, _losses(others)) if by_loss else (None, None)
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
        accuracy_mean=mean(accuracies),
        accuracy_std=_deviation(accuracies),
        accuracy_all_mean=mean(run.records[-1]["test_accuracy_all"] for run in runs),
        seconds=mean(run.seconds for run in runs),
        peak_memory_mib=max(run.peak_memory for run in runs),
        difference_to_bp=difference,
        difference_stderr=stderr,
        loss_mean=mean(losses) if by_loss else None,
        loss_std=_deviation(losses) if by_loss else None,
        loss_all_mean=mean(LOSS.combined(run.records[-1]) for run in runs) if by_loss else None,
        loss_to_bp=loss_difference,
        loss_stderr=loss_stderr,
        paper=reference.get((group.dataset, settings.rule)),
    )


def _accuracies(runs: Sequence[History]) -> list[float]:
    return [run.accuracies[-1] for run in runs]


def _losses(runs: Sequence[History]) -> list[float]:
    return [LOSS.exit(run.records[-1]) for run in runs]


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


def _percent(value: float | None, spread: float | None = None, *, sign: str = "") -> str:
    if value is None:
        return ""
    return f"{100 * value:{sign}.2f}".replace("-", "−") + ("" if spread is None else f" ± {100 * spread:.2f}")


def _nats(value: float | None, spread: float | None = None, *, sign: str = "") -> str:
    if value is None:
        return ""
    return f"{value:{sign}.4f}".replace("-", "−") + ("" if spread is None else f" ± {spread:.4f}")


def _of(done: int, planned: int) -> str:
    return str(done) if done == planned else f"{done} of {planned}"
