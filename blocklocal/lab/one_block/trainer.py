"""Training of one block: what it does in an epoch, and how its exit is tested."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from blocklocal.border import Border
from blocklocal.graph import mode
from blocklocal.lab.one_block.source import Source
from blocklocal.lab.runs.block_state import block_state, load_block_state, load_random_state, random_state
from blocklocal.lab.runs.checkpoint_part import State
from blocklocal.lab.training.evaluation import Exits, on_cpu
from blocklocal.lab.training.experiment import Experiment
from blocklocal.lab.training.optim import averaged, set_rate


class BlockTrainer:
    """Trains block k of an experiment on what a source gives it, as `SingleTrainer` trains it among all blocks."""

    def __init__(self, experiment: Experiment, k: int, source: Source) -> None:
        self.experiment, self.k, self.source = experiment, k, source
        self.settings, self.learner = experiment.settings, experiment.learner
        self.blocks = (k,)
        self.optimizer = experiment.optimizer(self.learner.block_parameters(k))

    def train(self, epoch: int, *, begin: int) -> Iterator[Tensor]:
        steps, accumulate = self.experiment.steps, self.settings.accumulate
        losses: list[Tensor] = []
        self.learner.train()
        for step, (h, y) in enumerate(self.source.training(epoch, begin=begin), start=begin):
            set_rate(self.optimizer, self.experiment.learning_rate((epoch - 1) * steps + step))
            with self.experiment.autocast():
                loss, _ = self.learner.local(self.k, h, y)
            (loss * (1 / accumulate)).backward()
            losses.append(loss.detach())
            del loss
            if len(losses) == accumulate:
                self.optimizer.step()
                self.optimizer.zero_grad(set_to_none=True)
                yield torch.stack(losses)[:, None]
                losses = []

    def states(self) -> dict[int, State]:
        return {self.k: block_state(self.learner, self.k, self.optimizer) | random_state()}

    def load(self, states: Mapping[int, State]) -> None:
        state = states[self.k]
        load_block_state(self.learner, self.k, self.optimizer, state)
        load_random_state(state)

    def validate(self) -> Exits | None:
        return self._exit("validation") if self.source.has("validation") else None

    def test(self) -> Exits:
        return self._exit("test")

    def averaged(self) -> AbstractContextManager[None]:
        return averaged([self.optimizer])

    @torch.no_grad()
    def diagnose(self, epoch: int) -> list[dict[str, float]]:
        """Of its own border, on the first batch of an epoch; nothing for the last block."""
        if self.k == len(self.learner.borders):
            return []
        border = self.learner.borders[self.k]
        assert isinstance(border, Border)
        h, y = next(iter(self.source.training(epoch)))
        with mode(self.learner, training=False), self.experiment.autocast():
            return [border.diagnose(border.message(self.learner.blocks[self.k](h)), y)]

    @torch.no_grad()
    def _exit(self, name: str) -> Exits:
        grading, batches = self.experiment.task.grading, []
        with mode(self.learner, training=False), self.experiment.autocast():
            for h, y in self.source.ordered(name):
                scores = grading.scores(self.learner.exit(self.k, h)[0])
                grades = on_cpu(grading.grade(scores, y))
                batches.append(({name: part[None] for name, part in grades.items()}, grades))
        return Exits.joined(grading, batches)
