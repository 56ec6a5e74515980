"""Data and learner of a run, made from its settings, for training and testing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from blocklocal import BlockLocal
from blocklocal.lab.data.dataset import Dataset
from blocklocal.lab.environment import find_device
from blocklocal.lab.errors import UserError, blame
from blocklocal.lab.models.weights import load_weights
from blocklocal.lab.names import WORD, short
from blocklocal.lab.settings import CHANGES, Settings
from blocklocal.lab.tasks.find import load_task
from blocklocal.lab.tasks.task import Batch, Task
from blocklocal.lab.training import rules
from blocklocal.lab.training.evaluation import Exits, evaluate, validate
from blocklocal.lab.training.narrow_maps import computed_wrongly, strides_checked
from blocklocal.lab.training.optim import SCHEDULES, make_optimizer
from blocklocal.lab.training.trial import FEW, try_checkpoint, try_learning, try_model

EXAMPLE = 8  # samples by which the blocks are balanced and the borders get their shapes
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Experiment:
    """The data of a task, and a model with its initial weights under a learning rule, both on `device`."""

    settings: Settings
    device: torch.device
    task: Task
    learning: rules.Learning

    @property
    def dataset(self) -> Dataset:
        return self.task.dataset

    @property
    def learner(self) -> BlockLocal:
        return self.learning.learner

    def to(self, device: torch.device) -> Experiment:
        """The same with its data on another device, for a trainer that brings the blocks there."""
        return replace(self, device=device, task=self.task.to(device))

    def optimizer(self, parameters: list[nn.Parameter]) -> Optimizer:
        """The optimizer of a block."""
        return make_optimizer(parameters, self.settings)

    def learning_rate(self, minibatch: int) -> float:
        """The learning rate for a minibatch, counted from 0 over all epochs."""
        settings, steps = self.settings, self.steps
        schedule, warmup = SCHEDULES[settings.schedule], round(settings.warmup * steps)
        return schedule(minibatch, warmup, settings.epochs * steps) * settings.lr

    def training_batches(self, epoch: int, *, begin: int = 0) -> Iterator[Batch]:
        """The batches of epoch 1, 2, ..., from minibatch `begin` on."""
        return islice(self.task.training_batches(epoch, begin=begin), self.steps - begin)

    def training_labels(self, epoch: int, *, begin: int = 0) -> Iterator[Tensor]:
        """The labels of `training_batches`."""
        return islice(self.task.training_labels(epoch, begin=begin), self.steps - begin)

    @property
    def sample(self) -> Tensor:
        """A few samples as they enter the model."""
        return self.task.prepared(self.dataset.train.inputs[:EXAMPLE])

    @property
    def steps(self) -> int:
        """Minibatches of an epoch: a whole number of optimizer steps."""
        whole = self.task.epoch_size // (self.settings.batch_size * self.settings.accumulate)
        return whole * self.settings.accumulate

    def autocast(self, device: torch.device | None = None) -> torch.autocast:
        """The precision set in the settings, on the experiment's device or another."""
        return autocast(self.settings, device=device or self.device)

    def test(self) -> Exits:
        """Evaluate all exits on the test samples."""
        with self.autocast():
            return evaluate(self.learner, self.dataset.test, task=self.task)

    def validate(self) -> Exits | None:
        """Fit the weights of the exits to the validation samples and evaluate them there; None if none are held out."""
        if self.dataset.validation is None:
            return None
        with self.autocast():
            return validate(self.learner, self.dataset.validation, task=self.task)

    def angles(self, epoch: int) -> dict[str, float]:
        """Degrees between the rule's gradient and the true one, by layer, on the first minibatch of an epoch; empty if
        the rule follows the true one."""
        alignment = self.learning.alignment
        if alignment is None:
            return {}
        return alignment.angles(*next(self.training_batches(epoch)), criterion=self.learner.criterion)


def check_data(task: Task, facts: Mapping[str, Any]) -> None:
    """Check the data against the facts in a run's config.json. UserError: it is another data set."""
    known, found = facts.get("data", {}), task.facts
    for name in sorted(found, key=lambda name: name == "digest"):  # which says least
        if name in known and known[name] != found[name]:
            raise UserError(
                f"data {task.dataset.name!r} is not what the run was trained on: {name.replace('_', ' ')} "
                f"{short(str(found[name]), longest=WORD)} now, {short(str(known[name]), longest=WORD)} then"
            )


def check_facts(experiment: Experiment, facts: Mapping[str, Any]) -> None:
    """Check what the settings of a run give against its config.json. UserError: they differ; a file was changed."""
    check_data(experiment.task, facts)
    for name, found in (("blocks", len(experiment.learner.blocks)), ("steps", experiment.steps)):
        if facts.get(name, found) != found:
            raise UserError(
                f"the run has {facts[name]} {name} by its config.json, and {found} by the settings there: "
                "restore the file, or start a new run with another --out"
            )


def autocast(settings: Settings, *, device: torch.device) -> torch.autocast:
    dtype = DTYPES[settings.dtype]
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def prepare(
    settings: Settings,
    *,
    device: torch.device | None = None,
    memory: AbstractContextManager[object] = nullcontext(),  # noqa: B008 (has no state)
) -> Experiment:
    """Prepare the experiment of these settings, on their device or another.

    memory: a context in which the model is built and tried, such as `FileMemory`.
    UserError: an unknown device, data set, model or rule; too few samples; a model that cannot be cut as requested, or
    does not train on a few samples.
    """
    settings.check()
    rules.find(settings.rule)
    device = device or find_device(settings.device)
    if settings.threads:
        torch.set_num_threads(settings.threads)
    task = load_task(settings, device=device)
    check_size(task)
    with memory:
        return Experiment(settings, device, task, _begin(task, device=device))


def _begin(task: Task, *, device: torch.device) -> rules.Learning:
    """The model with its initial weights under the rule of the settings, tried. UserError: see `prepare`."""
    settings = task.settings
    torch.manual_seed(settings.seed)
    model = task.build()
    if settings.weights is not None:
        load_weights(model, settings.weights)
    with blame(f"model {settings.model!r} cannot be put on {device}"):
        if settings.channels_last:
            model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        model.to(device)
    x, y = task.few(min(FEW, settings.batch_size // settings.replicas))
    context, grading = autocast(settings, device=device), task.grading
    with strides_checked(model, name=settings.model) if computed_wrongly(settings) else nullcontext():
        try_model(
            model,
            x,
            name=settings.model,
            shape=grading.shape(y),
            targets=grading.targets,
            unit=task.unit,
            context=context,
        )
    learning = learning_of(task, model, example=task.prepared(task.dataset.train.inputs[:EXAMPLE]))
    if settings.channels_last:  # the heads at the borders too
        learning.learner.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    try_learning(learning, x, y, name=settings.model, context=context)
    try_checkpoint(learning.learner, name=settings.model)
    return learning


def check_size(task: Task) -> None:
    """UserError: too few training samples for one step."""
    settings = task.settings
    if task.epoch_size < settings.batch_size * settings.accumulate:
        times = f" times --accumulate {settings.accumulate}" if settings.accumulate > 1 else ""
        have = f"the {task.epoch_size} training {task.unit}"
        raise UserError(f"--batch-size {settings.batch_size}{times} is more than {have}")


def learning_of(task: Task, model: nn.Module, *, example: Tensor) -> rules.Learning:
    """The model under the rule of the task's settings. example: samples as they enter it.

    UserError: the model does not fit the rule.
    """
    settings = task.settings
    problem = rules.Problem(
        classes=task.sizes.get("classes"),
        outputs=task.sizes.get("outputs"),
        example=example,
        blocks=settings.blocks,
        at=settings.at or task.cuts(),
        criterion=task.criterion,
        seed=settings.seed,
        changes=rules.Changes(**{name: getattr(settings, name) for name in CHANGES}),
        add_beliefs=settings.add_beliefs,
    )
    with blame(f"model {settings.model!r} does not fit rule {settings.rule!r}"):
        learning = rules.apply(settings.rule, model, problem)
    learning.learner.share_feedback(False)  # a pipeline of several processes says itself what its blocks share
    return learning
