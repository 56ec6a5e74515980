"""The experiment of one block: a learner of which that block alone has memory."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, fx

from blocklocal import BlockLocal
from blocklocal.lab.errors import UserError, blame
from blocklocal.lab.settings import Settings, flag
from blocklocal.lab.tasks.task import Task
from blocklocal.lab.training import rules
from blocklocal.lab.training.experiment import EXAMPLE, Experiment, learning_of, prepare

UNCHECKED = ("lookahead", "add_beliefs", "compile", "channels_last", "shard", "replicas")
"""Options that need another block too, or with which a block alone has not been compared with all together."""


def check_alone(settings: Settings) -> None:
    """UserError: settings with which no block can be trained alone."""
    settings.check()
    settings.check_alone()
    if rules.is_own(settings.rule) or not rules.find(settings.rule).in_blocks:
        raise UserError(f"--only trains a block of a rule in blocks: choose --rule bll instead of {settings.rule}")
    for name in UNCHECKED:
        if getattr(settings, name) != getattr(Settings, name):
            raise UserError(f"{flag(name)} is not for a block that is trained alone: leave it out")


def prepare_first(settings: Settings) -> Experiment:
    """The experiment of block 0 with its data, after the checks of `prepare`.

    Its settings name the cuts, so that they are the same wherever another block is trained. UserError: see `prepare`.
    """
    experiment = prepare(settings)
    if not settings.at:
        cuts = tuple(experiment.task.cuts() or cuts_of(experiment.learner))
        experiment = prepare(replace(settings, at=cuts, blocks=Settings.blocks))
    _leave(experiment.learner, 0, device=experiment.device)
    return experiment


def prepare_later(settings: Settings, k: int, *, task: Task, device: torch.device) -> Experiment:
    """The experiment of block k > 0. task: without data, see `task_without_data`.

    The weights that the model begins with are drawn in turn, as for `bll train` with the same seed, and those of all
    other blocks are given back before this returns. UserError: a model that cannot be built, or has no block k.
    """
    if settings.threads:
        torch.set_num_threads(settings.threads)
    torch.manual_seed(settings.seed)
    model = task.build()
    shape = task.few(EXAMPLE)[0]
    learning = learning_of(task, model, example=torch.zeros(shape.shape, dtype=shape.dtype))
    if not 0 <= k < len(learning.learner.blocks):
        raise UserError(f"--only {k}: the model has {len(learning.learner.blocks)} blocks, numbered from 0")
    with blame(f"model {settings.model!r} cannot be put on {device}"):
        _leave(learning.learner, k, device=device)
    return Experiment(settings, device, task, learning)


def _leave(learner: BlockLocal, k: int, *, device: torch.device) -> None:
    """Take the memory of all blocks but k, with its border."""
    border = learner.borders[k : k + 1]
    own = {id(tensor) for part in (learner.blocks[k], border) for tensor in (*part.parameters(), *part.buffers())}

    def place(tensor: Tensor) -> Tensor:
        return tensor.to(device if id(tensor) in own else "meta")

    learner.convert(place)


def cuts_of(learner: BlockLocal) -> list[str]:
    """The submodules after which the library has cut. UserError: a border stands behind none."""
    names: list[str] = []
    for k, block in enumerate(learner.blocks[:-1]):
        graph = block.graph if isinstance(block, fx.GraphModule) else None
        output = next(iter(reversed(graph.nodes))).args[0] if graph else None
        if not isinstance(output, fx.Node) or output.op != "call_module":
            raise UserError(f"the border of block {k} stands behind no submodule: name the cuts with --at")
        names.append(str(output.target))
    return names
