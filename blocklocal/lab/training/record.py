"""What a run tells of itself: its headline, the record of an epoch, and its last line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from blocklocal.lab import subcommand
from blocklocal.lab.distributed.process_group import Processes
from blocklocal.lab.environment import peak_memory
from blocklocal.lab.training.experiment import Experiment
from blocklocal.lab.training.loop import TrainingLoop
from blocklocal.lab.training.progress import Display, Plan
from blocklocal.lab.training.trainer import Trainer


def headline(trainer: Trainer, plan: Plan, processes: Processes) -> str:
    """What a run says of itself when it begins."""
    experiment = trainer.experiment
    settings, dataset, task = experiment.settings, experiment.dataset, experiment.task
    drawn = f"{task.epoch_size:,} of " if task.epoch_size < len(dataset.train) else ""
    model = f"{settings.model} in {plan.blocks} blocks" if plan.blocks > 1 else f"{settings.model} whole"
    here = ", ".join(map(str, trainer.blocks))
    part = f" over {processes.size} processes, here {here}" if processes.size > 1 else ""
    progress = ""
    if plan.done or plan.rest:
        inside = f" and {plan.rest} of {plan.steps} steps" if plan.rest else ""
        rest = "nothing is left to train" if plan.done == plan.epochs else "going on"
        progress = f"; {plan.done} of {plan.epochs} epochs{inside} are done, {rest}"
    return (
        f"{subcommand.title()}{settings.data}: {drawn}{len(dataset.train):,} training and {len(dataset.test):,} test "
        f"{task.unit} of {task.shape}; "
        f"{model}{part}, rule {settings.rule}, on {processes.device}{progress}"
    )


def train_epoch(epoch: int, loop: TrainingLoop, processes: Processes, *, shown: Display) -> dict[str, Any]:
    """Train and test through one epoch, together with the other processes; its line of metrics.jsonl."""
    trainer, experiment = loop.trainer, loop.experiment
    blocks = len(experiment.learner.blocks)

    def watch(step: int, losses: Sequence[float]) -> None:
        own = dict(zip(trainer.blocks, losses, strict=True))
        shown.step(epoch, step, [own.get(k) for k in range(blocks)])

    losses = torch.zeros(blocks, dtype=torch.float64)
    losses[list(trainer.blocks)] = loop.epoch(epoch, watch=watch).cpu()
    with trainer.averaged():
        held_out, exits, borders = trainer.validate(), trainer.test(), trainer.diagnose(epoch)
    record = {
        "epoch": epoch,
        "train_loss": (processes.sum(losses) / experiment.settings.replicas).tolist(),
        **exits.record,
        "seconds": round(loop.seconds, 3),
        "peak_memory_mib": round(processes.largest(peak_memory(processes.device)), 1),
        "borders": borders,
    }
    if held_out is not None:
        record |= {**held_out.validation_record, "exit_weights": list(experiment.learner.pool.weights)}
    if angles := experiment.angles(epoch):
        record["angles"] = angles
    shown.epoch(record)
    return record


def summary(records: Sequence[Mapping[str, Any]], experiment: Experiment) -> dict[str, Any]:
    """What `bll train` prints as its last line, from the records of all epochs."""
    last = records[-1]
    shown = {}
    for measure in experiment.task.shown:
        shown |= {measure.name: measure.exit(last), f"{measure.name}_all": measure.combined(last)}
    return {
        "rule": experiment.settings.rule,
        "blocks": len(experiment.learner.blocks),
        **shown,
        "seconds": round(sum(record["seconds"] for record in records), 3),
        "epochs": experiment.settings.epochs,
    }
