"""`bll eval`: the test result of a run at its last exit, an earlier one, all combined, or with early exits."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from rich.table import Table
from torch import Tensor
from tyro.conf import Positional, arg

from blocklocal import BlockLocal
from blocklocal.graph import mode
from blocklocal.lab.arguments import parse
from blocklocal.lab.errors import UserError
from blocklocal.lab.runs.folder import Run
from blocklocal.lab.tasks.measure import ACCURACY, LOSS, RMSE, Measure
from blocklocal.lab.tasks.task import Task
from blocklocal.lab.terminal import Terminal
from blocklocal.lab.training.evaluation import Exits
from blocklocal.lab.training.trained import load_trained
from blocklocal.operations import operations


@dataclass(frozen=True)
class Options:
    """Test a trained network: every exit, and the result of the chosen one."""

    run: Annotated[Positional[Path], arg(metavar="RUN")]
    """folder of the run"""
    exit: str = "last"
    """last, all (the exits combined), the number of a block, or a threshold between 0 and 1 such as 0.9: each
    image leaves at the first exit whose class has that probability"""
    data: str | None = None
    """another location of the same data set"""
    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda, ..."""
    trust: bool = False
    """run the code of the model package.module:function that the run names"""


def main(args: Sequence[str]) -> None:
    options = parse(Options, args, prog="bll eval")
    find_exit(options.exit)
    run = Run(options.run)
    find_exit(options.exit, blocks=run.facts()["blocks"])
    trained = load_trained(run, data=options.data, device=options.device, trust=options.trust)
    experiment, learner = trained.experiment, trained.learner
    if isinstance(find_exit(options.exit), float) and not learner.targets.labels:
        raise UserError(
            f"--exit {options.exit} is a probability of classes, and numbers have none: choose last, all, or a block"
        )
    experiment.validate()
    exits, costs = experiment.test(), prediction_costs(learner, experiment.sample)
    result = {"run": str(options.run), "epoch": trained.epoch, "exit": options.exit}
    for measure in experiment.task.shown:
        value = choose(exits, options.exit, measure=measure)
        result |= {measure.name: value} | ({"perplexity": math.exp(value)} if measure is LOSS else {})
    title = f"{options.run}, epoch {trained.epoch:g}"
    table = _table(exits, costs, title=title, exit=options.exit, task=experiment.task)
    Terminal().print(table)
    print(json.dumps(result))


def find_exit(exit: str, *, blocks: int | None = None) -> int | float | None:
    """What `--exit` names: a block, a threshold, or None for last and all. UserError: none of these, or no such block.

    blocks: their number, or None if it is not known yet.
    """
    if exit in ("last", "all"):
        return None
    if re.fullmatch(r"\d{1,9}", exit, re.ASCII) and (blocks is None or int(exit) < blocks):
        return int(exit)
    if re.fullmatch(r"0?\.\d+|0\.|1\.0*", exit, re.ASCII):
        return float(exit)
    which = "" if blocks is None else f" from 0 to {blocks - 1}"
    raise UserError(f"--exit {exit}: choose last, all, a block{which}, or a threshold between 0 and 1 such as 0.9")


def choose(exits: Exits, exit: str, *, measure: Measure) -> float:
    """The measure of what `--exit` asks for. UserError: no such exit."""
    values = exits.values(measure)
    found = find_exit(exit, blocks=len(values))
    if exit == "all":
        return exits.combined_value(measure)
    if isinstance(found, float):
        return exits.early_value(measure, found)
    return values[-1 if found is None else found]


def prediction_costs(learner: BlockLocal, x: Tensor) -> tuple[list[float], float]:
    """Operations of a prediction at each exit (blocks and head) and by all combined, as multiples of the model's."""
    with mode(learner, training=False):
        model = max(operations(learner.model, x), 1)
        alone = [operations(learner.predictor(exit=k).eval(), x) / model for k in range(len(learner.blocks))]
        return alone, operations(learner.predictor(exit="all").eval(), x) / model


COLUMNS: dict[Measure, dict[str, Callable[[float], str]]] = {
    ACCURACY: {"test accuracy": lambda accuracy: f"{accuracy:.2%}"},
    LOSS: {"nats": lambda nats: f"{nats:.4f}", "perplexity": lambda nats: f"{math.exp(nats):.2f}"},
    RMSE: {"test RMSE": lambda error: RMSE.show(error, finer=1)},
}
"""The columns of the table, by their headings."""


def _table(exits: Exits, costs: tuple[list[float], float], *, title: str, exit: str, task: Task) -> Table:
    table = Table("exit", title=title, title_justify="left")
    for name in (name for measure in task.shown for name in COLUMNS[measure]):
        table.add_column(name, justify="right")
    table.add_column("operations / model", justify="right")
    found = find_exit(exit)
    threshold = found if isinstance(found, float) else None
    if threshold is not None:
        table.add_column(f"{task.unit} that leave at {threshold:g}", justify="right")

    def cells(value: Callable[[Measure], float]) -> list[str]:
        return [form(value(measure)) for measure in task.shown for form in COLUMNS[measure].values()]

    for k in range(len(costs[0])):
        leaving = () if threshold is None else (f"{(exits.leaving(threshold) == k).double().mean().item():.2%}",)
        shown = cells(lambda measure, k=k: exits.values(measure)[k])
        table.add_row(str(k), *shown, f"{costs[0][k]:.2f}", *leaving)
    table.add_row("all", *cells(exits.combined_value), f"{costs[1]:.2f}")
    return table
