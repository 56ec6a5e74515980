"""`bll plan-memory`: what each way to train a model needs in memory, before anything is trained."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import torch
from rich.table import Table
from tyro.conf import FlagCreatePairsOff, Positional, arg

from blocklocal.lab.arguments import parse
from blocklocal.lab.bench.memory_plan import Need, Work, needs
from blocklocal.lab.environment import find_device
from blocklocal.lab.errors import UserError, blame
from blocklocal.lab.models.text import MODELS
from blocklocal.lab.ranges import Needs, Range
from blocklocal.lab.settings import Settings
from blocklocal.lab.tasks.outline import task_without_data
from blocklocal.lab.tasks.task import Task
from blocklocal.lab.terminal import Terminal
from blocklocal.lab.training.experiment import EXAMPLE, learning_of
from blocklocal.lab.training.optim import make_optimizer


@dataclass(frozen=True)
class Options:
    """Predict the memory of each way to train a model: by backpropagation, with checkpointing or accumulation, and in
    blocks, of which all are there, one at a time, or one alone on stored activations.

    Nothing is allocated for it, unless the library has to find the cuts: name them with --at for a model that does not
    fit.
    """

    model: Annotated[Positional[str], arg(metavar="MODEL")]
    """as for bll train; with --tokens one of text"""
    blocks: Annotated[int, Range(least=2), Needs("at", ((),))] = 4
    """number of blocks"""
    at: tuple[str, ...] = ()
    """submodules to cut after, instead of --blocks"""
    rule: Literal["bll", "bll-paper", "pred", "predsim"] = "bll"
    """learning rule of the blocks, which decides what is at the borders"""
    batch_size: Annotated[int, Range(least=2)] = 32
    """samples per step"""
    optimizer: Literal["sgd", "adamw", "schedulefree"] = "sgd"
    """as for bll train"""
    accumulate: Annotated[int, Range(least=1)] = 4
    """parts of the batch where gradients are accumulated"""
    channels: Annotated[int, Range(least=1, most=2**14), Needs("tokens", (0,))] = 3
    """colour channels of the images"""
    size: Annotated[int, Range(least=1, most=2**14), Needs("tokens", (0,))] = 32
    """height and width of the images in pixels"""
    classes: Annotated[int, Range(least=2, most=2**20), Needs("tokens", (0,))] = 10
    """number of classes"""
    tokens: Annotated[int, Range(least=0, most=2**24)] = 0
    """for a model of text: number of different tokens"""
    context: Annotated[int, Range(least=2, most=2**20), Needs("tokens")] = 64
    """tokens in a window"""
    measure: Annotated[bool, FlagCreatePairsOff] = False
    """also make the steps, and show what they needed"""
    device: str = "auto"
    """for --measure: auto (a GPU if there is one), cpu, cuda, ..."""


def main(args: Sequence[str]) -> None:
    options = parse(Options, args, prog="bll plan-memory")
    if options.batch_size % options.accumulate:
        raise UserError(f"--accumulate {options.accumulate} does not divide --batch-size {options.batch_size}")
    if options.model in MODELS and not options.tokens:
        raise UserError(f"model {options.model!r} is for text: add --tokens, the number of different ones")
    if options.model.startswith("hf:") and options.tokens:
        raise UserError(
            f"model {options.model!r} reads what is in its mask, which tensors without memory do not have: "
            "bll train writes peak_memory_mib to metrics.jsonl"
        )
    task = _task(options)
    settings = task.settings
    if not settings.at and not task.cuts():
        model = task.build()
        shape = task.few(EXAMPLE)[0]
        learner = learning_of(task, model, example=torch.zeros(shape.shape, dtype=shape.dtype)).learner
        task.settings = replace(settings, at=tuple(learner.cuts))
    with blame(f"model {options.model!r} cannot be built on the meta device"):
        predicted = needs(_work(task, accumulate=options.accumulate, device=torch.device("meta")))
    measured = None
    if options.measure:
        device = find_device(options.device)
        with blame(f"model {options.model!r} fails in a step"):
            measured = needs(_work(task, accumulate=options.accumulate, device=device))
    console = Terminal()
    if not console.is_terminal:
        console.width = 140
    console.print(_table(predicted, measured, title=f"{options.model}, {options.batch_size} {task.unit} per step"))
    result = {"model": options.model, "batch_size": options.batch_size, "optimizer": options.optimizer}
    result |= {"predicted": [need.plain() for need in predicted]}
    if measured:
        result |= {"measured": [need.plain() for need in measured]}
    print(json.dumps(result))


def _task(options: Options) -> Task:
    """The task of a batch, without data."""
    settings = Settings(
        data="text:none" if options.tokens else "none",
        model=options.model,
        blocks=options.blocks,
        at=options.at,
        rule=options.rule,
        batch_size=options.batch_size,
        optimizer=options.optimizer,
        context=options.context,
    )
    shape = [options.channels, options.size, options.size]
    counts = {f"{use}_{unit}": options.batch_size for use in ("training", "test") for unit in ("images", "windows")}
    facts = {"shape": shape, "classes": list(map(str, range(options.classes))), "tokens": options.tokens} | counts
    return task_without_data(settings, facts)


def _work(task: Task, *, accumulate: int, device: torch.device) -> Work:
    shapes, settings = task.few(task.settings.batch_size), task.settings
    x, y = (torch.zeros(part.shape, dtype=part.dtype, device=device) for part in shapes)

    def build() -> torch.nn.Module:
        with device:
            return task.build()

    return Work(
        build=build,
        learner=lambda model: learning_of(task, model, example=x[:EXAMPLE]).learner,
        optimizer=lambda parameters: make_optimizer(parameters, settings),
        criterion=task.criterion,
        x=x,
        y=y,
        accumulate=accumulate,
    )


def _table(predicted: Sequence[Need], measured: Sequence[Need] | None, *, title: str) -> Table:
    table = Table("MiB", "block", title=title, title_justify="left")
    columns = ("weights", "gradients", "optimizer state", "activations", "in all")
    for column in (*columns, *(("measured", "deviation") if measured else ())):
        table.add_column(column, justify="right")
    for need, found in zip(predicted, measured or [None] * len(predicted), strict=True):
        values = (need.weights, need.gradients, need.state, need.activations, need.total)
        compared = (f"{found.total / 2**20:,.2f}", f"{need.total / found.total - 1:+.1%}") if found else ()
        block = "" if need.block is None else str(need.block)
        table.add_row(need.way, block, *(f"{value / 2**20:,.2f}" for value in values), *compared)
    return table
