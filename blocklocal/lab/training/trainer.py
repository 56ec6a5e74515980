"""Training in one process: what it does in an epoch, and what it needs to continue after any minibatch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

import torch
from torch import Tensor

from blocklocal.lab.runs.block_state import (
    alignment_state,
    block_state,
    load_alignment_state,
    load_block_state,
    load_random_state,
    random_state,
)
from blocklocal.lab.runs.checkpoint_part import State
from blocklocal.lab.training.evaluation import Exits
from blocklocal.lab.training.experiment import Experiment
from blocklocal.lab.training.optim import averaged, set_rate


class Trainer(Protocol):
    """Trains the blocks of this process; every process of a run calls the same methods in the same order."""

    experiment: Experiment

    @property
    def blocks(self) -> Sequence[int]:
        """The blocks that this process trains."""
        ...

    def train(self, epoch: int, *, begin: int) -> Iterator[Tensor]:
        """Train epoch 1, 2, ... from minibatch `begin` on; yields local losses (minibatches, blocks) now and then.

        When it yields, the states of all processes are those after the same minibatch.
        """
        ...

    def states(self) -> Mapping[int, State]:
        """What `load` needs to continue, for each block that this process saves."""
        ...

    def load(self, states: Mapping[int, State]) -> None:
        """Restore the states, each asked for once. UserError: they are of another model."""
        ...

    def validate(self) -> Exits | None:
        """See `Experiment.validate`."""
        ...

    def test(self) -> Exits:
        """Evaluate all exits on the test samples."""
        ...

    def averaged(self) -> AbstractContextManager[None]:
        """See `optim.averaged`: a context for tests, and for saving the trained model."""
        ...

    def diagnose(self, epoch: int) -> list[dict[str, float]]:
        """Diagnose each border on the first minibatch of an epoch, see `BlockLocal.diagnose`."""
        ...


class SingleTrainer:
    """Trains the learner of an experiment in this process, block after block, with one optimizer per block."""

    def __init__(self, experiment: Experiment) -> None:
        self.experiment, self.settings, self.learner = experiment, experiment.settings, experiment.learner
        self.blocks = range(len(self.learner.blocks))
        self.optimizers = [experiment.optimizer(self.learner.block_parameters(k)) for k in self.blocks]

    def train(self, epoch: int, *, begin: int) -> Iterator[Tensor]:
        steps, accumulate = self.experiment.steps, self.settings.accumulate
        scale, losses = 1 / accumulate, []
        self.learner.train()
        for step, (x, y) in enumerate(self.experiment.training_batches(epoch, begin=begin), start=begin):
            for optimizer in self.optimizers:
                set_rate(optimizer, self.experiment.learning_rate((epoch - 1) * steps + step))
            with self.experiment.autocast(), self.experiment.learning.with_targets(y, scale=scale):
                if accumulate == 1:  # a block's gradients are freed before the next block begins
                    losses.append(self.learner.backward(x, y, optimizers=self.optimizers))
                else:
                    losses.append(self.learner.backward(x, y, scale=scale))
            if len(losses) == accumulate:
                if accumulate > 1:
                    for optimizer in self.optimizers:
                        optimizer.step()
                        optimizer.zero_grad(set_to_none=True)
                yield torch.stack(losses)
                losses = []

    def states(self) -> Mapping[int, State]:
        states = {k: block_state(self.learner, k, self.optimizers[k]) for k in self.blocks}
        states[0] |= random_state()
        if self.experiment.learning.alignment:
            states[0] |= alignment_state(self.experiment.learning.alignment)
        return states

    def load(self, states: Mapping[int, State]) -> None:
        for k, state in states.items():
            load_block_state(self.learner, k, self.optimizers[k], state)
            if k == 0:
                if self.experiment.learning.alignment:
                    load_alignment_state(self.experiment.learning.alignment, state)
                load_random_state(state)

    def validate(self) -> Exits | None:
        return self.experiment.validate()

    def test(self) -> Exits:
        return self.experiment.test()

    def averaged(self) -> AbstractContextManager[None]:
        return averaged(self.optimizers)

    def diagnose(self, epoch: int) -> list[dict[str, float]]:
        return self.learner.diagnose(*next(self.experiment.training_batches(epoch)))
