"""The training loop: minibatch after minibatch, with checks of the losses and checkpoints."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from blocklocal.lab.distributed.process_group import Processes
from blocklocal.lab.errors import UserError
from blocklocal.lab.runs.block_state import misfit
from blocklocal.lab.runs.checkpoint_part import State
from blocklocal.lab.runs.checkpoints import Checkpoints, EachInTurn
from blocklocal.lab.training.trainer import Trainer

Watch = Callable[[int, Sequence[float]], None]

POLL_SECONDS = 0.2  # seconds between two looks at the losses, each of which waits for the device
LOSSES, SECONDS = "progress.losses", "progress.seconds"  # of the epoch so far, in the state of a block


class TrainingLoop:
    """The progress of a trainer, and what it needs to continue bit for bit.

    checkpoints: written after every `save_every` minibatches of an epoch and at its end.
    """

    def __init__(self, trainer: Trainer, checkpoints: Checkpoints, *, save_every: int) -> None:
        self.trainer, self.checkpoints, self.save_every = trainer, checkpoints, save_every
        self.experiment = trainer.experiment
        self.steps = self.experiment.steps
        self.losses: list[Tensor] = []
        """The losses of this process's blocks in the epoch so far, (minibatches, blocks)."""
        self.seconds = 0.0
        """Seconds that the epoch has taken so far."""

    def begin(self, processes: Processes, *, resume: bool) -> int:
        """Load the last complete checkpoint, if any; returns the number of minibatches that are done.

        All other checkpoints are deleted. UserError: it cannot be read, or belongs to another model.
        """
        latest = self.checkpoints.latest() if resume else None
        minibatch = processes.broadcast(latest or 0)
        if minibatch:
            self._load(minibatch)
        processes.barrier()  # all can read theirs, and so the others are needed no more
        if processes.rank == 0:
            self.checkpoints.discard_others(minibatch)
        processes.barrier()
        return minibatch

    def epoch(self, epoch: int, *, watch: Watch) -> Tensor:
        """Train through the rest of epoch 1, 2, ...; returns the mean local loss of each block of this process.

        watch(step, losses) is called now and then and at the end, with each block's mean loss since the last call.
        UserError: a loss or a weight is not a number.
        """
        start, looked, unseen = time.perf_counter(), time.monotonic(), []
        step = sum(map(len, self.losses))
        for window in self.trainer.train(epoch, begin=step):
            self.losses.append(window)
            unseen.append(window)
            before, step = step, step + len(window)
            due = step < self.steps and step // self.save_every > before // self.save_every
            if due or step == self.steps or time.monotonic() - looked > POLL_SECONDS:
                recent = torch.cat(unseen)
                self._check_losses(recent, epoch=epoch, first=step - len(recent))
                watch(step, recent.mean(0).tolist())
                looked, unseen = time.monotonic(), []
            if due:
                start, passed = time.perf_counter(), time.perf_counter() - start
                self.seconds += passed
                self._save((epoch - 1) * self.steps + step)
        self.seconds += time.perf_counter() - start
        self._check_weights(epoch=epoch)
        return torch.cat(self.losses).double().mean(0)

    def end_epoch(self, epoch: int) -> None:
        """An epoch is done and recorded."""
        self.losses, self.seconds = [], 0.0
        self._save(epoch * self.steps)

    def _load(self, minibatch: int) -> None:
        """Give the trainer its states, each read when it asks for it, and take from them what `_save` has added.

        UserError: it does not match the number of steps; see `begin`.
        """
        steps, blocks = minibatch % self.steps, self.trainer.blocks
        found: dict[int, Tensor] = {}
        times: list[float] = []

        def state(k: int) -> State:
            state = self.checkpoints.load(minibatch, k)
            losses, seconds = state.pop(LOSSES, None), state.pop(SECONDS, None)
            if not isinstance(losses, Tensor) or losses.shape != (steps,) or not isinstance(seconds, float):
                raise misfit(f"the losses of {steps} steps of the epoch, or their time, are missing")
            found[k] = losses.clone()  # not mapped from the file
            times.append(seconds)
            return state

        self.trainer.load(EachInTurn(blocks, state))
        self.losses = [torch.stack([found[k] for k in blocks], 1).to(self.experiment.device)] if steps else []
        self.seconds = max(times)

    def _save(self, minibatch: int) -> None:
        states, blocks = self.trainer.states(), self.trainer.blocks
        losses = torch.cat(self.losses) if self.losses else torch.zeros(0, len(blocks))
        self.checkpoints.save(
            minibatch,
            EachInTurn(states, lambda k: states[k] | {LOSSES: losses[:, blocks.index(k)], SECONDS: self.seconds}),
            together=self.experiment.learner.offloaded is None,
        )

    def _check_losses(self, losses: Tensor, *, epoch: int, first: int) -> None:
        """losses: (minibatches, blocks), from step `first` of the epoch on."""
        wrong = (~losses.isfinite()).nonzero()
        if len(wrong):
            step, i = wrong[0].tolist()
            raise UserError(
                f"the loss of block {self.trainer.blocks[i]} is {losses[step, i].item()} at step {first + step + 1} "
                f"of epoch {epoch}: {self._remedy}"
            )

    def _check_weights(self, *, epoch: int) -> None:
        """Check the weights, since the last step of an epoch may spoil them after the last loss."""
        offloaded = self.experiment.learner.offloaded
        for k in self.trainer.blocks:
            if offloaded is not None:
                with torch.no_grad():
                    offloaded.bring(k)
            for parameter in self.experiment.learner.block_parameters(k):
                own = parameter.to_local() if isinstance(parameter, DTensor) else parameter
                if not own.isfinite().all():
                    raise UserError(
                        f"weights of block {k} are not finite after the last step of epoch {epoch}: {self._remedy}"
                    )

    @property
    def _remedy(self) -> str:
        return f"lower --lr (now {self.experiment.settings.lr:g}) or lengthen --warmup"
