"""One epoch of training, and what is needed to go on after it bit for bit."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD

from blocklocal.lab.errors import UserError
from blocklocal.lab.experiment import Experiment
from blocklocal.lab.schedule import SCHEDULES

Watch = Callable[[int, list[float]], None]

LOOK = 0.2  # seconds between two looks at the losses, each of which waits for the device


class Trainer:
    """The learner of an experiment and its optimizers, one per block, under one schedule."""

    def __init__(self, experiment: Experiment) -> None:
        self.experiment, self.settings, self.learner = experiment, experiment.settings, experiment.learner
        self.steps = len(experiment.dataset.train) // self.settings.batch_size
        self.optimizers = [
            SGD(
                [{"params": self.learner.block_parameters(k)}],  # a group may be empty, a list of parameters may not
                lr=self.settings.lr,
                momentum=self.settings.momentum,
                weight_decay=self.settings.weight_decay,
                nesterov=True,
            )
            for k in range(len(self.learner.blocks))
        ]

    def epoch(self, epoch: int, *, watch: Watch) -> list[float]:
        """Train through epoch 1, 2, ...; the mean local loss of each block.

        watch(step, losses) is called now and then and at the end, with each block's mean loss since the last call.
        UserError: a loss that is no number.
        """
        self.learner.train()
        losses: list[Tensor] = []
        seen, looked = 0, time.monotonic()
        for step, (x, y) in enumerate(self.experiment.training_batches(epoch)):
            self._set_rate((epoch - 1) * self.steps + step)
            with self.experiment.autocast(), self.experiment.learning.given(y):
                losses.append(self.learner.backward(x, y, optimizers=self.optimizers))
            if step + 1 == self.steps or time.monotonic() - looked > LOOK:
                recent = torch.stack(losses[seen:])
                self._check_losses(recent, epoch=epoch, first=seen)
                watch(step + 1, recent.mean(0).tolist())
                seen, looked = step + 1, time.monotonic()
        self._check_weights(epoch=epoch)
        return torch.stack(losses).mean(0).tolist()

    def state_dict(self) -> dict[str, Any]:
        return {
            "experiment": self.experiment.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "random": torch.get_rng_state(),
            "random_cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """UserError: the state of another model."""
        self.experiment.load_state_dict(state["experiment"])
        for optimizer, stored in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(stored)
        torch.set_rng_state(state["random"])
        if state["random_cuda"] and torch.cuda.is_available():
            torch.cuda.set_rng_state_all(state["random_cuda"])

    def _set_rate(self, step: int) -> None:
        total = self.settings.epochs * self.steps
        share = SCHEDULES[self.settings.schedule](step, round(self.settings.warmup * self.steps), total)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = share * self.settings.lr

    def _check_losses(self, losses: Tensor, *, epoch: int, first: int) -> None:
        """losses: (steps, K), from step `first` of the epoch on."""
        wrong = (~losses.isfinite()).nonzero()
        if len(wrong):
            step, block = wrong[0].tolist()
            raise UserError(
                f"the loss of block {block} is {losses[step, block].item()} at step {first + step + 1} "
                f"of epoch {epoch}: lower --lr (now {self.settings.lr:g}) or lengthen --warmup"
            )

    def _check_weights(self, *, epoch: int) -> None:
        """The last step of an epoch may spoil weights after the last loss that was seen."""
        for k in range(len(self.learner.blocks)):
            for parameter in self.learner.block_parameters(k):
                if not parameter.isfinite().all():
                    raise UserError(
                        f"weights of block {k} are not finite after the last step of epoch {epoch}: "
                        f"lower --lr (now {self.settings.lr:g}) or lengthen --warmup"
                    )
