"""A run's model as its last checkpoint left it, for testing and sampling."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from blocklocal import BlockLocal
from blocklocal.lab.errors import UserError
from blocklocal.lab.runs.block_state import load_block_state
from blocklocal.lab.runs.checkpoints import Checkpoints
from blocklocal.lab.runs.folder import Run
from blocklocal.lab.training.experiment import Experiment, check_facts, prepare
from blocklocal.lab.training.optim import averages
from blocklocal.lab.training.recipes import refuse_code


@dataclass(frozen=True)
class Trained:
    """The experiment of a run, with the weights after `minibatch` minibatches."""

    experiment: Experiment
    minibatch: int

    @property
    def learner(self) -> BlockLocal:
        return self.experiment.learner

    @property
    def epoch(self) -> float:
        return round(self.minibatch / self.experiment.steps, 2)


def load_trained(run: Run, *, data: str | None, device: str, trust: bool) -> Trained:
    """Load the model of a run. data: another location of the same data set, if any.

    UserError: no run or no checkpoint there; other data; code of the user's own that was not trusted.
    """
    settings = run.settings()
    if not trust:
        refuse_code(settings, run=run.path)
    experiment = prepare(replace(settings, device=device, data=data or settings.data, weights=None))
    check_facts(experiment, run.facts())
    learner = experiment.learner
    checkpoints = Checkpoints(run.checkpoints, blocks=len(learner.blocks))
    minibatch = checkpoints.latest()
    if minibatch is None:
        raise UserError(f"{str(run.path)!r} has no checkpoint: the run was stopped before the first")
    load_tested(experiment, checkpoints, minibatch=minibatch, blocks=range(len(learner.blocks)))
    return Trained(experiment, minibatch)


def load_tested(experiment: Experiment, checkpoints: Checkpoints, *, minibatch: int, blocks: Iterable[int]) -> None:
    """Give these blocks the weights with which they were tested after `minibatch` minibatches: see `optim.averaged`."""
    learner = experiment.learner
    for k in blocks:
        optimizer = experiment.optimizer(learner.block_parameters(k))
        averaging = averages(optimizer)
        load_block_state(learner, k, optimizer if averaging else None, checkpoints.load(minibatch, k))
        if averaging:
            optimizer.eval()
