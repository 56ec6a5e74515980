"""`bll train`: a training run from its settings to its folder."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

from blocklocal.lab import outputs
from blocklocal.lab.distributed.process_group import Processes, environment, joined
from blocklocal.lab.environment import describe
from blocklocal.lab.errors import UserError, blame, of_machine, place
from blocklocal.lab.runs.block_state import unshard
from blocklocal.lab.runs.checkpoints import Checkpoints, resumable
from blocklocal.lab.runs.event_log import event_log, require_tensorboard
from blocklocal.lab.runs.folder import Run
from blocklocal.lab.runs.lock import MOMENT
from blocklocal.lab.settings import Settings
from blocklocal.lab.terminal import Terminal
from blocklocal.lab.training import rules
from blocklocal.lab.training.experiment import Experiment, check_facts, prepare
from blocklocal.lab.training.loop import TrainingLoop
from blocklocal.lab.training.offloaded_trainer import OffloadedTrainer, folder_of, memory_of
from blocklocal.lab.training.progress import Plan, display
from blocklocal.lab.training.recipes import settings_from
from blocklocal.lab.training.record import headline, summary, train_epoch
from blocklocal.lab.training.trained import load_tested
from blocklocal.lab.training.trainer import SingleTrainer, Trainer

RESTART = 30.0  # seconds


def main(args: Sequence[str]) -> None:
    summary = train(settings_from(args))
    if summary:
        print(json.dumps(summary))


def train(settings: Settings) -> dict[str, Any]:
    """Train as the settings say; returns what `bll train` prints as its last line, nothing on any rank but 0.

    Where torchrun or `bll launch` has started several processes, each trains its own blocks. The folder gets
    config.json at the start, checkpoints on the way, a line of metrics.jsonl after every epoch, and model.safetensors
    at the end. UserError: settings, data or a folder that cannot be used; a loss that is no number.
    """
    settings.check()
    if settings.tensorboard:
        require_tensorboard()
    if environment() is None:
        settings.check_alone()
    else:
        rules.check_over_processes(settings.rule)
        settings.check_together()
    if settings.offload != "none":
        rules.check_offloaded(settings.rule)
    run = Run(settings.folder)
    with joined(device=settings.device, timeout=settings.timeout) as processes, _alone(run, processes):
        return _train(run, settings, processes)


def _alone(run: Run, processes: Processes) -> AbstractContextManager[None]:
    """The first process holds the folder for all; after a restart the one before it may need some time to end."""
    if processes.rank > 0:
        return nullcontext()
    return run.alone(timeout=RESTART if processes.restarted else MOMENT)


def _train(run: Run, settings: Settings, processes: Processes) -> dict[str, Any]:
    """Load, build, train."""
    resume = settings.resume or (processes.restarted and run.exists)
    if processes.rank == 0:
        _open(run, resume=resume)
    memory = memory_of(settings, run=run)
    elsewhere = processes.distributed or settings.offload != "none"  # its trainer brings each block to the device
    experiment = prepare(settings, device=torch.device("cpu") if elsewhere else processes.device, memory=memory)
    if resume:
        check_facts(experiment, run.facts())
    with _blamed(settings, processes):
        trainer = _trainer(experiment, processes, run=run, memory=memory)
    with _closed(trainer):
        return _train_and_save(run, trainer, processes, resume=resume)


def _train_and_save(run: Run, trainer: Trainer, processes: Processes, *, resume: bool) -> dict[str, Any]:
    """Go on from the last checkpoint, if any, to the last epoch, and save the model."""
    experiment = trainer.experiment
    settings = experiment.settings
    checkpoints = Checkpoints(run.checkpoints, blocks=len(experiment.learner.blocks))
    if processes.rank == 0:
        _prepare_folder(run, experiment, checkpoints, processes, resume=resume)
    processes.barrier()
    processes.log_to(run.path)
    loop = TrainingLoop(trainer, checkpoints, save_every=settings.save_every)
    done, rest = divmod(loop.begin(processes, resume=resume), experiment.steps)
    records = run.rewind(epochs=done) if processes.rank == 0 else []
    if settings.compile:
        experiment.learner.compile()
    plan = Plan(
        settings.epochs,
        experiment.steps,
        settings.batch_size,
        checkpoints.blocks,
        done=done,
        rest=rest,
        unit=experiment.task.unit,
        judged_by=experiment.task.judged_by,
    )
    console = Terminal(stderr=True)
    console.print(headline(trainer, plan, processes), soft_wrap=True)
    events = event_log(run.events, records, wanted=settings.tensorboard and processes.rank == 0)
    with resumable(run, checkpoints, launched=processes.distributed):
        with display(console, plan) as shown, events as log_event:
            for epoch in range(done + 1, settings.epochs + 1):
                with _blamed(settings, processes):
                    record = train_epoch(epoch, loop, processes, shown=shown)
                if processes.rank == 0:
                    run.append(record)
                    log_event(record)
                records.append(record)
                loop.end_epoch(epoch)
        checkpoints.wait()
        processes.barrier()
        if processes.rank > 0:
            return {}
        with trainer.averaged():
            _save(run, experiment, checkpoints, own=trainer.blocks)
    return {**summary(records, experiment), "out": str(run.path)}


def _open(run: Run, *, resume: bool) -> None:
    """UserError: a folder that does not hold what is to be resumed, or holds what is not to be lost."""
    if resume:
        run.records()
    else:
        run.refuse()


def _prepare_folder(
    run: Run, experiment: Experiment, checkpoints: Checkpoints, processes: Processes, *, resume: bool
) -> None:
    if resume:
        _refuse_anew(run, checkpoints)
    else:
        _begin(run, experiment, processes)
    if experiment.settings.trace:
        run.forget_traces()


@contextmanager
def _closed(trainer: Trainer) -> Iterator[None]:
    """In the end, and whatever happens before, nothing is left of blocks that lived in files."""
    try:
        yield
    finally:
        if isinstance(trainer, OffloadedTrainer):
            trainer.close()


def _save(run: Run, experiment: Experiment, checkpoints: Checkpoints, *, own: Sequence[int]) -> None:
    """The trained model, with the blocks of all processes; of the checkpoints the last one stays."""
    checkpoints.discard_others(checkpoints.latest())
    _gather(experiment, checkpoints, own=own)
    offloaded = experiment.learner.offloaded
    if offloaded is None:
        run.save_model(experiment.learner.model)
    else:
        outputs.write(run.model, offloaded.save_model)


def _refuse_anew(run: Run, checkpoints: Checkpoints) -> None:
    """UserError: a run that has come too far to begin again, without a checkpoint to go on from."""
    if checkpoints.lost(epochs=len(run.records())) or (run.model.exists() and checkpoints.latest() is None):
        raise UserError(
            f"{str(run.checkpoints)!r} has no whole checkpoint, though the run has done epochs: "
            "put it back, or train anew with another --out"
        )


def _blamed(settings: Settings, processes: Processes) -> AbstractContextManager[None]:
    """What goes wrong in a model of the user's is said of it.

    Over processes it may also be what follows from another's failure, or what another start mends.
    """
    if ":" not in settings.model:
        return nullcontext()
    subject = f"model {settings.model!r} fails in training"
    if not processes.distributed:
        return blame(subject)
    return blame(subject, unless=lambda error: of_machine(error) or not place(error))


def _trainer(
    experiment: Experiment, processes: Processes, *, run: Run, memory: AbstractContextManager[object]
) -> Trainer:
    """UserError: more processes than blocks; a folder for offloaded blocks that cannot be used."""
    settings = experiment.settings
    if processes.distributed:
        from blocklocal.lab.training.pipeline_trainer import PipelineTrainer  # FSDP2 takes a second to import

        return PipelineTrainer(experiment, processes, trace=run.traces if settings.trace else None)
    if settings.offload != "none":
        there = experiment.to(processes.device)
        return OffloadedTrainer(there, folder=folder_of(settings, run=run), memory=memory)
    return SingleTrainer(experiment)


def _begin(run: Run, experiment: Experiment, processes: Processes) -> None:
    facts = {
        "data": experiment.task.facts,
        "parameters": sum(parameter.numel() for parameter in experiment.learner.model.parameters()),
        "blocks": len(experiment.learner.blocks),
        "steps": experiment.steps,
        "processes": processes.size,
    }
    run.create(experiment.settings, facts=facts | describe(processes.device))


def _gather(experiment: Experiment, checkpoints: Checkpoints, *, own: Sequence[int]) -> None:
    """The blocks that other processes have trained, from the checkpoint of the end. OSError: it is not there."""
    end = experiment.settings.epochs * experiment.steps
    if experiment.settings.shard:
        unshard(experiment.learner)
        own = ()
    others = [k for k in range(len(experiment.learner.blocks)) if k not in own]
    if others and checkpoints.latest() != end:
        raise OSError("the last checkpoint is not whole, and with it the other processes' blocks: --resume tries again")
    load_tested(experiment, checkpoints, minibatch=end, blocks=others)
