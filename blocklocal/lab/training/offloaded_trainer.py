"""Training with one block at a time on the device: `bll train --offload`."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from torch import Tensor

from blocklocal import FileStore, HostStore
from blocklocal.lab.errors import UserError
from blocklocal.lab.runs.block_state import block_state, random_state
from blocklocal.lab.runs.checkpoint_part import State
from blocklocal.lab.runs.checkpoints import EachInTurn
from blocklocal.lab.runs.folder import Run
from blocklocal.lab.settings import Settings
from blocklocal.lab.training.experiment import Experiment
from blocklocal.lab.training.file_memory import FileMemory
from blocklocal.lab.training.trainer import SingleTrainer


def on_disk(settings: Settings) -> bool:
    """Whether blocks live in files."""
    return settings.offload.partition(":")[0] == "disk"


def folder_of(settings: Settings, *, run: Run) -> Path:
    """Where blocks of a run live in files: the folder that --offload names, or one of the run's own."""
    named = settings.offload.partition(":")[2]
    return Path(named) if named else run.path / "blocks"


def memory_of(settings: Settings, *, run: Run) -> AbstractContextManager[object]:
    """The memory in which the model of a run is built and tried: files, if its blocks are to live in files."""
    return FileMemory(folder_of(settings, run=run)) if on_disk(settings) else nullcontext()


class OffloadedTrainer(SingleTrainer):
    """Trains as `SingleTrainer` does, to the bit. The blocks leave when training begins, after a checkpoint was loaded.

    experiment: its model is in host memory, its data on the device where blocks are trained. folder: where blocks live
    with --offload disk; it is removed in the end. memory: where they are until they leave, see `memory_of`. UserError:
    the folder is in use, or holds something else.
    """

    def __init__(self, experiment: Experiment, *, folder: Path, memory: AbstractContextManager[object]) -> None:
        super().__init__(experiment)
        if len(self.blocks) == 1:
            raise UserError("--offload has an effect with two blocks or more: leave it out, or raise --blocks")
        self._folder, self._memory = folder, memory
        try:
            self._store = FileStore(folder) if on_disk(self.settings) else HostStore()
            if self._store.saved:
                raise ValueError(f"{str(self._folder)!r} holds blocks that were saved: choose another folder")
        except ValueError as error:
            raise UserError(f"--offload {self.settings.offload}: {error}") from error

    def train(self, epoch: int, *, begin: int) -> Iterator[Tensor]:
        if self.learner.offloaded is None:
            made = {p: one for one in self.optimizers for group in one.param_groups for p in group["params"]}
            with self._memory:
                self.learner.offload(
                    self._store,
                    optimizer=lambda own: next(made[p] for p in own if p in made),
                    device=self.experiment.device,
                )
        yield from super().train(epoch, begin=begin)

    def load(self, states: Mapping[int, State]) -> None:
        with self._memory:
            super().load(states)

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
