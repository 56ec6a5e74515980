"""`bll train`: a training run from its settings to its folder."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from rich.console import Console

from blocklocal.lab.arguments import parse
from blocklocal.lab.config import Settings
from blocklocal.lab.environment import describe, peak_memory
from blocklocal.lab.errors import UserError
from blocklocal.lab.experiment import Experiment, prepare
from blocklocal.lab.progress import Display, Plan, display
from blocklocal.lab.recipes import DIGITS, recipe
from blocklocal.lab.runs import Run
from blocklocal.lab.trainer import Trainer


def main(args: Sequence[str]) -> None:
    print(json.dumps(train(settings_from(args))))


def settings_from(args: Sequence[str]) -> Settings:
    """What is not given comes from the recipe of the data set, or from the run that is resumed.

    UserError: unusable arguments, or such as contradict the run that is resumed.
    """
    data = parse(Settings, [arg for arg in args if arg not in ("-h", "--help")], prog="bll train", default=DIGITS).data
    settings = parse(Settings, args, prog="bll train", default=recipe(data))
    if not settings.resume:
        return settings
    stored = replace(Run(settings.folder).settings(), out=settings.out, resume=True)
    given = parse(Settings, args, prog="bll train", default=stored)
    changed = stored.contradictions(given)
    if changed:
        raise UserError(
            f"{', '.join(changed)} differs from the run in {str(settings.folder)!r}: "
            "resume it with its own settings, or begin another run in another --out"
        )
    return given


def train(settings: Settings) -> dict[str, Any]:
    """Train as the settings say; returns what `bll train` prints as its last line.

    The folder gets config.json at the start, a line of metrics.jsonl and a checkpoint after every epoch, and
    model.safetensors at the end. UserError: settings, data or a folder that cannot be used; a loss that is no number.
    """
    run = Run(settings.folder)
    if run.exists and not settings.resume:
        raise UserError(
            f"{str(run.path)!r} already holds a run: go on with --resume, or choose another folder with --out"
        )
    experiment = prepare(settings)
    trainer = Trainer(experiment)
    records: list[dict[str, Any]] = []
    if settings.resume:
        records = _resume(run, trainer)
    else:
        _begin(run, experiment)
    if settings.compile:
        experiment.learner.compile()
    plan = Plan(settings.epochs, trainer.steps, settings.batch_size, len(experiment.learner.blocks), done=len(records))
    console = Console(stderr=True)
    console.print(_headline(experiment, plan), highlight=False, soft_wrap=True)
    try:
        with display(console, plan) as shown:
            for epoch in range(plan.done + 1, settings.epochs + 1):
                record = _epoch(epoch, trainer, shown)
                run.append(record)
                run.save_checkpoint({"epoch": epoch, **trainer.state_dict()})
                records.append(record)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(_kept(run, records)) from None
    except UserError as error:
        raise UserError(f"{error}; {_kept(run, records)}") from None
    run.save_model(experiment.learner.model)
    return {
        "rule": settings.rule,
        "blocks": plan.blocks,
        "accuracy": records[-1]["test_accuracy"][-1],
        "accuracy_all": records[-1]["test_accuracy_all"],
        "seconds": round(sum(record["seconds"] for record in records), 3),
        "epochs": settings.epochs,
        "out": str(run.path),
    }


def _begin(run: Run, experiment: Experiment) -> None:
    dataset = experiment.dataset
    facts = {
        "data": {
            "training_images": len(dataset.train),
            "test_images": len(dataset.test),
            "shape": [dataset.channels, *dataset.size],
            "classes": dataset.classes,
        },
        "parameters": sum(parameter.numel() for parameter in experiment.learner.model.parameters()),
    }
    run.create(experiment.settings, facts=facts | describe(experiment.device))


def _resume(run: Run, trainer: Trainer) -> list[dict[str, Any]]:
    """Back to the last checkpoint, or the start where there is none; the records of the epochs behind it."""
    checkpoint = run.load_checkpoint()
    if checkpoint is None:
        run.rewind(epochs=0)
        return []
    trainer.load_state_dict(checkpoint)
    return run.rewind(epochs=checkpoint["epoch"])


def _epoch(epoch: int, trainer: Trainer, shown: Display) -> dict[str, Any]:
    """Train and test through one epoch; its line of metrics.jsonl."""
    experiment = trainer.experiment
    start = time.perf_counter()
    losses = trainer.epoch(epoch, watch=lambda step, losses: shown.step(epoch, step, losses))
    seconds = time.perf_counter() - start
    exits = experiment.test()
    x, y = next(experiment.training_batches(epoch))
    record = {
        "epoch": epoch,
        "train_loss": losses,
        "test_accuracy": exits.accuracies,
        "test_accuracy_all": exits.combined_accuracy,
        "seconds": round(seconds, 3),
        "peak_memory_mib": round(peak_memory(experiment.device), 1),
        "borders": experiment.learner.diagnose(x, y),
    }
    if angles := experiment.angles(x, y):
        record["angles"] = angles
    shown.epoch(record)
    return record


def _headline(experiment: Experiment, plan: Plan) -> str:
    settings, dataset = experiment.settings, experiment.dataset
    channels, (height, width) = dataset.channels, dataset.size
    model = f"{settings.model} in {plan.blocks} blocks" if plan.blocks > 1 else f"{settings.model} whole"
    progress = ""
    if plan.done:
        rest = "nothing is left to train" if plan.done == plan.epochs else "going on"
        progress = f"; {plan.done} of {plan.epochs} epochs are done, {rest}"
    return (
        f"{settings.data}: {len(dataset.train):,} training and {len(dataset.test):,} test images of "
        f"{channels}x{height}x{width}, {len(dataset.classes)} classes; "
        f"{model}, rule {settings.rule}, on {experiment.device}{progress}"
    )


def _kept(run: Run, records: list[dict[str, Any]]) -> str:
    if not records:
        return "no epoch was finished"
    return f"{str(run.path)!r} keeps the checkpoint of epoch {len(records)}"
