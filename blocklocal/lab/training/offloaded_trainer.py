"""Training with one block at a time on the device: `bll train --offload`."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from blocklocal import FileStore, HostStore
from blocklocal.lab.errors import UserError
from blocklocal.lab.runs.block_state import block_state, random_state
from blocklocal.lab.runs.checkpoint_part import State
from blocklocal.lab.runs.checkpoints import EachInTurn
from blocklocal.lab.training.experiment import Experiment
from blocklocal.lab.training.trainer import SingleTrainer


class OffloadedTrainer(SingleTrainer):
    """Trains as `SingleTrainer` does, to the bit. The blocks leave when training begins, after a checkpoint was loaded.

    folder: where they live with --offload disk, unless that names one; it is removed in the end. UserError: the folder
    is in use, or holds something else.
    """

    def __init__(self, experiment: Experiment, *, folder: Path) -> None:
        super().__init__(experiment)
        if len(self.blocks) == 1:
            raise UserError("--offload has an effect with two blocks or more: leave it out, or raise --blocks")
        where, _, named = self.settings.offload.partition(":")
        self._folder = Path(named) if named else folder
        try:
            self._store = FileStore(self._folder) if where == "disk" else HostStore()
            if self._store.saved:
                raise ValueError(f"{str(self._folder)!r} holds blocks that were saved: choose another folder")
        except ValueError as error:
            raise UserError(f"--offload {self.settings.offload}: {error}") from error

    def train(self, epoch: int, *, begin: int) -> Iterator[Tensor]:
        if self.learner.offloaded is None:
            made = {p: one for one in self.optimizers for group in one.param_groups for p in group["params"]}
            self.learner.offload(
                self._store,
                optimizer=lambda own: next(made[p] for p in own if p in made),
                device=self.experiment.device,
            )
        yield from super().train(epoch, begin=begin)

    def states(self) -> EachInTurn:
        return EachInTurn(self.blocks, self._state)

    def close(self) -> None:
        """Remove the files of the blocks."""
        if isinstance(self._store, FileStore):
            self._store.close()
            shutil.rmtree(self._folder)

    def _state(self, k: int) -> State:
        if self.learner.offloaded is not None:  # since training began
            self.learner.offloaded.bring(k)
        return block_state(self.learner, k, self.optimizers[k]) | (random_state() if k == 0 else {})
