"""The experiment of one block: a learner of which that block alone has memory."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from blocklocal import BlockLocal
from blocklocal.graph import mode
from blocklocal.lab.environment import find_device
from blocklocal.lab.errors import UserError, blame
from blocklocal.lab.one_block.initial import Moving, on_meta, values_of
from blocklocal.lab.settings import Settings, flag
from blocklocal.lab.tasks.find import load_task
from blocklocal.lab.tasks.outline import task_without_data
from blocklocal.lab.tasks.task import Task
from blocklocal.lab.training import rules
from blocklocal.lab.training.experiment import EXAMPLE, Experiment, check_size, learning_of, prepare
from blocklocal.lab.training.narrow_maps import computed_wrongly, strides_checked

UNCHECKED = (
    *("weights", "tensorboard", "lookahead", "add_beliefs", "compile", "channels_last", "shard", "replicas"),
    "offload",  # nothing else is there anyway
)
"""Options that need another block too, or with which a block alone has not been compared with all together."""


def check_alone(settings: Settings) -> None:
    """UserError: settings with which no block can be trained alone."""
    settings.check()
    settings.check_alone()
    if rules.is_own(settings.rule) or not rules.find(settings.rule).in_blocks:
        raise UserError(f"--only trains a block of a rule in blocks: choose --rule bll instead of {settings.rule}")
    if settings.blocks == 1 and not settings.at:
        raise UserError("--blocks 1 has no border, and so no block to train alone: use bll train without --only")
    for name in UNCHECKED:
        if getattr(settings, name) != getattr(Settings, name):
            raise UserError(f"{flag(name)} is not for a block that is trained alone: leave it out")
    if settings.copies_output_layer:
        raise UserError("--head unembedding is not for a block that is trained alone: choose another head")


def prepare_first(settings: Settings) -> Experiment:
    """The experiment of block 0 with its data.

    Its settings name the cuts, so that they are the same wherever another block is trained. UserError: see `prepare`.
    """
    device = find_device(settings.device)
    task = load_task(settings, device=device)
    check_size(task)
    if not settings.at:
        cuts = tuple(task.cuts() or prepare(settings).learner.cuts)
        settings = task.settings = replace(settings, at=cuts, blocks=Settings.blocks)
    alone = prepare_alone(settings, 0, task=task_without_data(settings, task.facts), device=device)
    return replace(alone, task=task)


def prepare_alone(settings: Settings, k: int, *, task: Task, device: torch.device) -> Experiment:
    """The experiment of block k. task: without data, see `task_without_data`.

    The block begins with the weights that it has in `bll train` with the same seed, see `initial`; a model whose
    constructor is not suited to that stands whole in memory until this returns. UserError: a model that cannot be
    built, or has no block k.
    """
    if settings.threads:
        torch.set_num_threads(settings.threads)
    try:
        learning = _begin_alone(task, k, device=device)
    except Exception:  # whatever is wrong with the model itself is wrong there too, and said there
        learning = _begin_whole(task, k, device=device)
    if computed_wrongly(settings):
        with strides_checked(learning.learner.blocks[k], name=settings.model):
            _try(learning.learner, k, example=task.few(EXAMPLE)[0], device=device)
    return Experiment(settings, device, task, learning)


def _begin_alone(task: Task, k: int, *, device: torch.device) -> rules.Learning:
    """The model on the meta device except for block k. Exception: it cannot be built there, or see `values_of`."""
    model, numbers = on_meta(task.build)
    example = task.few(EXAMPLE)[0]
    learner = learning_of(task, model, example=example).learner
    tensors = {id(tensor): name for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    wanted = {tensors[id(tensor)] for tensor in (*learner.blocks[k].parameters(), *learner.blocks[k].buffers())}
    torch.manual_seed(task.settings.seed)
    values = values_of(task.build, wanted=wanted, numbers=numbers)
    with Moving() as moving:
        learning = learning_of(task, model, example=example)
    border = learning.learner.borders[k : k + 1]
    own = {id(tensor) for tensor in (*border.parameters(), *border.buffers())}

    def place(tensor: Tensor) -> Tensor:
        if id(tensor) in own:
            return moving.source(tensor).detach().to(device)
        name = tensors.get(id(tensor))
        return values[name].to(device) if name in wanted else tensor

    learning.learner.convert(place)
    _try(learning.learner, k, example=example, device=device)
    return learning


@torch.no_grad()
def _try(learner: BlockLocal, k: int, *, example: Tensor, device: torch.device) -> None:
    """Run block k once. Exception: it fails, since some of it is still on the meta device, for example."""
    border: Any = learner.borders[k - 1] if k else None
    h = (
        torch.zeros(example.shape, dtype=example.dtype)
        if border is None
        else torch.zeros(len(example), *border.spec.shape)
    )
    with mode(learner, training=False), torch.random.fork_rng([device] if device.type == "cuda" else []):
        learner.exit(k, h.to(device))


def _begin_whole(task: Task, k: int, *, device: torch.device) -> rules.Learning:
    torch.manual_seed(task.settings.seed)
    model = task.build()
    shape = task.few(EXAMPLE)[0]
    learning = learning_of(task, model, example=torch.zeros(shape.shape, dtype=shape.dtype))
    if not 0 <= k < len(learning.learner.blocks):
        raise UserError(f"--only {k}: the model has {len(learning.learner.blocks)} blocks, numbered from 0")
    with blame(f"model {task.settings.model!r} cannot be put on {device}"):
        _leave(learning.learner, k, device=device)
    return learning


def _leave(learner: BlockLocal, k: int, *, device: torch.device) -> None:
    """Take the memory of all blocks but k, with its border."""
    border = learner.borders[k : k + 1]
    own = {id(tensor) for part in (learner.blocks[k], border) for tensor in (*part.parameters(), *part.buffers())}

    def place(tensor: Tensor) -> Tensor:
        return tensor.to(device if id(tensor) in own else "meta")

    learner.convert(place)
