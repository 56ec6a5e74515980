"""`bll train --only K`: a block trained alone, from its settings to its folder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from blocklocal.border import Border
from blocklocal.lab.distributed.process_group import Processes, environment
from blocklocal.lab.environment import describe, find_device, peak_memory
from blocklocal.lab.errors import UserError, blame
from blocklocal.lab.one_block.activations import Activations
from blocklocal.lab.one_block.alone import prepare_alone, prepare_first
from blocklocal.lab.one_block.folder import BlockRun, Upstream, trained_on, weights_of
from blocklocal.lab.one_block.options import Request, request_from
from blocklocal.lab.one_block.source import Data, Source
from blocklocal.lab.one_block.trainer import BlockTrainer
from blocklocal.lab.runs.checkpoints import Checkpoints, resumable
from blocklocal.lab.tasks.outline import task_without_data
from blocklocal.lab.terminal import Terminal
from blocklocal.lab.training.experiment import Experiment, check_data
from blocklocal.lab.training.loop import TrainingLoop
from blocklocal.lab.training.progress import Plan, display


def main(args: Sequence[str]) -> None:
    print(json.dumps(train_block(request_from(args))))


def train_block(request: Request) -> dict[str, Any]:
    """Train one block; returns what the command prints as its last line.

    The folder gets block.json at the start, checkpoints on the way, a line of metrics.jsonl after every epoch, and
    block.safetensors at the end. UserError: settings, data, a cache or a folder that cannot be used; a loss that is no
    number.
    """
    if environment() is not None:
        raise UserError("--only trains one block in one process: start it with bll train, not over processes")
    run = request.run
    with run.alone():
        return _train(run, request)


def _train(run: BlockRun, request: Request) -> dict[str, Any]:
    resume, k = request.settings.resume, request.block
    if resume:
        run.records()
    else:
        run.refuse()
    experiment, source = opened(request)
    settings = experiment.settings
    blocks = len(experiment.learner.blocks)
    if not any(parameter.requires_grad for parameter in experiment.learner.block_parameters(k)):
        raise UserError(f"block {k} of model {settings.model!r} has no parameters to train")
    checkpoints = Checkpoints(run.checkpoints, blocks=blocks, only=k)
    if resume:
        if request.cache is None:
            check_data(experiment.task, run.facts())
        if checkpoints.lost(epochs=len(run.records())):
            raise UserError(f"{str(run.checkpoints)!r} has no whole checkpoint: put it back, or train in another --out")
    else:
        run.create(settings, facts=_facts(experiment, request))
    trainer = BlockTrainer(experiment, k, source)
    loop = TrainingLoop(trainer, checkpoints, save_every=settings.save_every)
    processes = Processes(experiment.device)
    done, rest = divmod(loop.begin(processes, resume=resume), experiment.steps)
    records = run.rewind(epochs=done)
    task = experiment.task
    plan = Plan(
        settings.epochs, experiment.steps, settings.batch_size, 1, done, rest, unit=task.unit, judged_by=task.judged_by
    )
    console = Terminal(stderr=True)
    reads = f"the cache {str(request.cache.path)!r}" if request.cache else settings.data
    begun = f"; {done} of {settings.epochs} epochs are done" if done or rest else ""
    console.print(
        f"block {k} of {blocks} of {settings.model} alone, from {reads}: {experiment.steps * settings.batch_size:,} "
        f"{task.unit} per epoch, rule {settings.rule}, on {experiment.device}{begun}",
        soft_wrap=True,
    )
    with resumable(run, checkpoints):
        with display(console, plan) as shown:
            for epoch in range(done + 1, settings.epochs + 1):
                with blame(f"model {settings.model!r} fails in training", unless=lambda _: ":" not in settings.model):
                    mean = loop.epoch(epoch, watch=lambda step, losses, epoch=epoch: shown.step(epoch, step, losses))
                    record = _record(epoch, mean.tolist(), trainer, seconds=loop.seconds)
                shown.epoch(record)
                run.append(record)
                records.append(record)
                loop.end_epoch(epoch)
        checkpoints.wait()
        checkpoints.discard_others(checkpoints.latest())
        with trainer.averaged():
            run.save_weights(weights_of(experiment.learner, k))
    last = records[-1]
    return {
        "block": k,
        "blocks": blocks,
        **{measure.name: measure.exit(last) for measure in task.grading.measures},
        "seconds": round(sum(record["seconds"] for record in records), 3),
        "epochs": settings.epochs,
        "out": str(run.path),
    }


def opened(request: Request) -> tuple[Experiment, Source]:
    """The experiment of a block, and what it reads. UserError: see `prepare`; a cache of another model."""
    cache, settings = request.cache, request.settings
    if cache is None:
        experiment = prepare_first(settings)
        return experiment, Data(experiment)
    cache.device = find_device(settings.device)
    try:
        task = task_without_data(settings, cache.contents.data)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{str(cache.path)!r} does not say what its data are ({error}): write it again") from error
    experiment = prepare_alone(settings, request.block, task=task, device=cache.device)
    _check_fit(experiment, cache, k=request.block)
    return experiment, cache


def upstream_of(cache: Activations | None) -> Upstream | None:
    """What a block records of the cache that it reads."""
    if cache is None:
        return None
    return {"path": str(cache.path.absolute()), "digest": cache.digest, "blocks": list(cache.contents.blocks)}


def _check_fit(experiment: Experiment, cache: Activations, *, k: int) -> None:
    """UserError: the model, as it is built now, does not have such a border."""
    border = experiment.learner.borders[k - 1]
    assert isinstance(border, Border)
    if tuple(border.spec.shape) != cache.contents.shape or experiment.steps != cache.steps:
        raise UserError(
            f"{str(cache.path)!r} holds {cache.steps} batches of activations of shape {cache.contents.shape}, the "
            f"model as it is built now has {experiment.steps} of {tuple(border.spec.shape)} there: write it anew"
        )


def _facts(experiment: Experiment, request: Request) -> dict[str, Any]:
    upstream = upstream_of(request.cache)
    data = request.cache.contents.data if request.cache else experiment.task.facts
    parameters = experiment.learner.block_parameters(request.block)
    return {
        "data": data,
        "parameters": sum(parameter.numel() for parameter in parameters),
        "blocks": len(experiment.learner.blocks),
        "steps": experiment.steps,
        "processes": 1,
        "block": request.block,
        "upstream": upstream,
        "trained_on": trained_on(experiment.settings, data, upstream),
    } | describe(experiment.device)


def _record(epoch: int, losses: list[float], trainer: BlockTrainer, *, seconds: float) -> dict[str, Any]:
    """The line of metrics.jsonl of an epoch. border: see `Border.diagnose`."""
    with trainer.averaged():
        held_out, exit, borders = trainer.validate(), trainer.test(), trainer.diagnose(epoch)
    record = {
        "epoch": epoch,
        "train_loss": losses,
        **exit.record,
        "seconds": round(seconds, 3),
        "peak_memory_mib": round(peak_memory(trainer.experiment.device), 1),
        "borders": [],
    }
    if borders:
        record["border"] = borders[0]
    if held_out is not None:
        record |= {name: value for name, value in held_out.validation_record.items() if not name.endswith("_all")}
    return record
