"""Data and learner of a run, made from its settings, for training and testing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import SGD

from blocklocal import BlockLocal
from blocklocal.lab import models
from blocklocal.lab.data import batches
from blocklocal.lab.data.batches import Augmentation, Normalisation
from blocklocal.lab.data.dataset import Dataset
from blocklocal.lab.data.load import load
from blocklocal.lab.environment import find_device
from blocklocal.lab.errors import UserError, blame
from blocklocal.lab.models.weights import load_weights
from blocklocal.lab.names import WORD, short
from blocklocal.lab.settings import CHANGES, Settings
from blocklocal.lab.training import rules
from blocklocal.lab.training.evaluation import Exits, evaluate, validate
from blocklocal.lab.training.optim import SCHEDULES, make_optimizer
from blocklocal.lab.training.trial import FEW, try_checkpoint, try_learning, try_model

EXAMPLE = 8  # images by which the blocks are balanced and the borders get their shapes
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Experiment:
    """A data set, and a model with its initial weights under a learning rule, both on `device`."""

    settings: Settings
    device: torch.device
    dataset: Dataset
    normalisation: Normalisation
    learning: rules.Learning

    @property
    def learner(self) -> BlockLocal:
        return self.learning.learner

    def optimizer(self, parameters: list[nn.Parameter]) -> SGD:
        """The optimizer of a block."""
        settings = self.settings
        return make_optimizer(
            parameters,
            lr=settings.lr,
            momentum=settings.momentum,
            weight_decay=settings.weight_decay,
            clip=settings.clip,
        )

    def learning_rate(self, minibatch: int) -> float:
        """The learning rate for a minibatch, counted from 0 over all epochs."""
        settings, steps = self.settings, self.steps
        schedule, warmup = SCHEDULES[settings.schedule], round(settings.warmup * steps)
        return schedule(minibatch, warmup, settings.epochs * steps) * settings.lr

    def training_batches(self, epoch: int, *, begin: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of epoch 1, 2, ..., from minibatch `begin` on."""
        settings = self.settings
        whole_epoch = batches.training_batches(
            self.dataset.train,
            normalisation=self.normalisation,
            size=settings.batch_size,
            seed=settings.seed,
            epoch=epoch,
            augmentation=Augmentation(flip=settings.flip, crop=settings.crop, cutout=settings.cutout),
            begin=begin,
        )
        return islice(whole_epoch, self.steps - begin)

    def training_labels(self, epoch: int, *, begin: int = 0) -> Iterator[Tensor]:
        """The labels of `training_batches`."""
        settings = self.settings
        whole_epoch = batches.training_labels(
            self.dataset.train, size=settings.batch_size, seed=settings.seed, epoch=epoch, begin=begin
        )
        return islice(whole_epoch, self.steps - begin)

    @property
    def sample(self) -> Tensor:
        """A few images as they enter the model."""
        return self.normalisation(self.dataset.train.images[:EXAMPLE])

    @property
    def steps(self) -> int:
        """Minibatches of an epoch: a whole number of optimizer steps."""
        whole = len(self.dataset.train) // (self.settings.batch_size * self.settings.accumulate)
        return whole * self.settings.accumulate

    def autocast(self, device: torch.device | None = None) -> torch.autocast:
        """The precision set in the settings, on the experiment's device or another."""
        return autocast(self.settings, device=device or self.device)

    def test(self) -> Exits:
        """Evaluate all exits on the test images."""
        with self.autocast():
            return evaluate(self.learner, self.dataset.test, normalisation=self.normalisation)

    def validate(self) -> Exits | None:
        """Fit the weights of the exits to the validation images and evaluate them there; None if none are held out."""
        if self.dataset.validation is None:
            return None
        with self.autocast():
            return validate(self.learner, self.dataset.validation, normalisation=self.normalisation)

    def angles(self, epoch: int) -> dict[str, float]:
        """Degrees between the rule's gradient and the true one, by layer, on the first minibatch of an epoch; empty if
        the rule follows the true one."""
        alignment = self.learning.alignment
        if alignment is None:
            return {}
        return alignment.angles(*next(self.training_batches(epoch)), criterion=self.learner.criterion)


def check_data(dataset: Dataset, facts: Mapping[str, Any]) -> None:
    """Check the data against the facts in a run's config.json. UserError: it is another data set."""
    known, found = facts.get("data", {}), dataset.facts
    for name in found:
        if name in known and known[name] != found[name]:
            raise UserError(
                f"data {dataset.name!r} is not what the run was trained on: {name.replace('_', ' ')} "
                f"{short(str(found[name]), longest=WORD)} now, {short(str(known[name]), longest=WORD)} then"
            )


def check_facts(experiment: Experiment, facts: Mapping[str, Any]) -> None:
    """Check what the settings of a run give against its config.json. UserError: they differ; a file was changed."""
    check_data(experiment.dataset, facts)
    for name, found in (("blocks", len(experiment.learner.blocks)), ("steps", experiment.steps)):
        if facts.get(name, found) != found:
            raise UserError(
                f"the run has {facts[name]} {name} by its config.json, and {found} by the settings there: "
                "restore the file, or start a new run with another --out"
            )


def autocast(settings: Settings, *, device: torch.device) -> torch.autocast:
    dtype = DTYPES[settings.dtype]
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def prepare(settings: Settings, *, device: torch.device | None = None) -> Experiment:
    """Prepare the experiment of these settings, on their device or another.

    UserError: an unknown device, data set, model or rule; too few images; a model that cannot be cut as requested, or
    does not train on a few images.
    """
    settings.check()
    rules.find(settings.rule)
    device = device or find_device(settings.device)
    if settings.threads:
        torch.set_num_threads(settings.threads)
    dataset = load(
        settings.data,
        train_size=settings.train_size,
        test_size=settings.test_size,
        validation=settings.validation,
    )
    normalisation = Normalisation.of(dataset.train.images).to(device)  # the same numbers for every device
    dataset = dataset.to(device)
    images = len(dataset.train)
    if images < settings.batch_size * settings.accumulate:
        times = f" times --accumulate {settings.accumulate}" if settings.accumulate > 1 else ""
        raise UserError(f"--batch-size {settings.batch_size}{times} is more than the {images} training images")
    if settings.crop >= min(dataset.size):
        raise UserError(f"--crop {settings.crop} is not less than the {min(dataset.size)} pixels of an image's side")
    if settings.cutout > min(dataset.size):
        raise UserError(f"--cutout {settings.cutout} is more than the {min(dataset.size)} pixels of an image's side")
    torch.manual_seed(settings.seed)
    model = models.build(
        settings.model,
        channels=dataset.channels,
        size=dataset.size,
        classes=len(dataset.classes),
        arguments=models.read_arguments(settings.model_args),
    )
    if settings.weights is not None:
        load_weights(model, settings.weights)
    with blame(f"model {settings.model!r} cannot be put on {device}"):
        if settings.channels_last:
            model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        model.to(device)
    few = _spread(images, size=min(FEW, settings.batch_size // settings.replicas))
    x, y, context = (
        normalisation(dataset.train.images[few]),
        dataset.train.labels[few],
        autocast(settings, device=device),
    )
    try_model(model, x, name=settings.model, classes=len(dataset.classes), context=context)
    task = rules.Task(
        classes=len(dataset.classes),
        example=normalisation(dataset.train.images[:EXAMPLE]),
        blocks=settings.blocks,
        at=settings.at or models.CUTS.get((settings.model, settings.blocks)),
        criterion=partial(cross_entropy, label_smoothing=settings.label_smoothing),
        seed=settings.seed,
        changes=rules.Changes(**{name: getattr(settings, name) for name in CHANGES}),
        add_beliefs=settings.add_beliefs,
    )
    with blame(f"model {settings.model!r} does not fit rule {settings.rule!r}"):
        learning = rules.apply(settings.rule, model, task)
    learning.learner.share_feedback(False)  # a pipeline of several processes says itself what its blocks share
    if settings.channels_last:  # the heads at the borders too
        learning.learner.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    try_learning(learning, x, y, name=settings.model, context=context)
    try_checkpoint(learning.learner, name=settings.model)
    return Experiment(settings, device, dataset, normalisation, learning)


def _spread(images: int, *, size: int) -> Tensor:
    """A number of rows of a split, evenly spaced, so that they have several classes even if images are sorted."""
    return torch.arange(size) * images // size
