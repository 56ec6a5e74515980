"""A training run over processes: the blocks of this process in a pipeline, its results combined with the others'."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.optim import Optimizer

from blocklocal import Pipeline
from blocklocal.border import Border
from blocklocal.collapse import warn_of_collapse
from blocklocal.lab.data.dataset import Split
from blocklocal.lab.distributed.process_group import Processes
from blocklocal.lab.errors import UserError
from blocklocal.lab.runs.block_state import block_state, load_block_state
from blocklocal.lab.runs.checkpoint_part import State
from blocklocal.lab.tasks.grading import Grades
from blocklocal.lab.training.evaluation import Exits, weigh
from blocklocal.lab.training.experiment import DTYPES, Experiment
from blocklocal.lab.training.optim import averaged, set_rate
from blocklocal.pipeline import Placement, balanced, replicate, shard
from blocklocal.pipeline.pipeline import Batch
from blocklocal.pipeline.stage import Stage

WINDOW = 8  # minibatches at least between two looks at the losses
MEASURED = 32  # samples of a minibatch by which processes measure the blocks, at most


class PipelineTrainer:
    """The experiment, which is on the CPU, as a pipeline over processes: the blocks of this one go to its device.

    Blocks are placed to balance the times that the processes measure; the placement does not change results. The first
    replica of a block keeps its state. trace: folder for a file that records what this process does and when, rewritten
    after every epoch. UserError: more processes than blocks, or not a multiple of the replicas.
    """

    def __init__(self, experiment: Experiment, processes: Processes, *, trace: Path | None = None) -> None:
        self.experiment, self.settings, self.processes = experiment, experiment.settings, processes
        self.learner, self.device = experiment.learner, processes.device
        self.replicas, blocks = self.settings.replicas, len(self.learner.blocks)
        ranks, rest = divmod(processes.size, self.replicas)
        if rest:
            raise UserError(f"{processes.size} processes are not a multiple of --replicas {self.replicas}")
        if ranks > blocks:
            raise UserError(
                f"{ranks} processes for {blocks} block{'s' * (blocks > 1)}: each needs a block; take fewer "
                "processes or more --blocks" + f" (rule {self.settings.rule} trains the model whole)" * (blocks == 1)
            )
        self.replica = processes.rank % self.replicas
        mesh = init_device_mesh(self.device.type, (ranks, self.replicas), mesh_dim_names=("block", "data"))
        self.pipeline = Pipeline(
            self.learner,
            optimizer=experiment.optimizer,
            placement=None if ranks in (1, blocks) else self._placement(mesh),
            mesh=mesh,
            data_parallel=shard if self.settings.shard else replicate,
            device=self.device,
            message_dtype=DTYPES[self.settings.message_dtype],
            window=WINDOW + -WINDOW % self.settings.accumulate,
            accumulate=self.settings.accumulate,
            timeout=self.settings.timeout,
            seed=self.settings.seed,
            trace=trace is not None,
            lookahead=self.settings.lookahead != "none",
        )
        self.blocks = self.pipeline.blocks
        self.traces = trace
        for stage in self.pipeline.stages:
            self._follow_schedule(stage)

    def train(self, epoch: int, *, begin: int) -> Iterator[Tensor]:
        self.pipeline.minibatches = (epoch - 1) * self.experiment.steps + begin
        losses = self.pipeline.train(self._training_batches(epoch, begin=begin))
        while True:
            with self.experiment.autocast(self.device):
                window = next(losses, None)
            if window is None:
                break
            yield window
        if self.traces and self.pipeline.trace:
            self.traces.mkdir(parents=True, exist_ok=True)
            self.pipeline.trace.save(self.traces / f"rank{self.processes.rank}.jsonl")

    def states(self) -> dict[int, State]:
        states = {stage.k: block_state(self.learner, stage.k, stage.optimizer) for stage in self.pipeline.stages}
        return states if self.replica == 0 else {}  # the others have given the first their shares

    def load(self, states: Mapping[int, State]) -> None:
        for stage in self.pipeline.stages:
            load_block_state(self.learner, stage.k, stage.optimizer, states[stage.k])

    def validate(self) -> Exits | None:
        split = self.experiment.dataset.validation
        if split is None:
            return None
        grading = self.experiment.task.grading
        scores = torch.zeros(len(self.learner.blocks), *grading.shape(split.labels))
        for rows, found in self._scores(split):
            scores[self.blocks, rows] = found
        return weigh(self.learner, self.processes.sum(scores), split.labels, grading=grading)

    def test(self) -> Exits:
        test, grading = self.experiment.dataset.test, self.experiment.task.grading
        grades: Grades = {}
        scores = torch.zeros(grading.shape(test.labels))
        weights = torch.tensor([self.learner.pool.weights[k] for k in self.blocks])
        for rows, found in self._scores(test):
            for name, part in grading.grade(found, test.labels[rows]).items():
                part = part.unflatten(1, (found.shape[1], -1))
                kept = grades.setdefault(name, torch.zeros(len(self.learner.blocks), len(test), part.shape[-1]))
                kept[self.blocks, rows] = part
            scores[rows] = (weights.view(-1, *[1] * (found.dim() - 1)) * found).sum(0)
        grades = {name: self.processes.sum(part).flatten(1) for name, part in grades.items()}
        combined = grading.scores(self.processes.sum(scores))
        return Exits(grading, grades, grading.grade(combined, test.labels))

    def averaged(self) -> AbstractContextManager[None]:
        return averaged([stage.optimizer for stage in self.pipeline.stages])

    def diagnose(self, epoch: int) -> list[dict[str, float]]:
        x, y = next(self._training_batches(epoch, begin=0))
        own = self.pipeline.diagnose(x, y)
        borders = [border for border in self.learner.borders if isinstance(border, Border)]
        names = borders[0].diagnostics if borders else []
        values = torch.zeros(len(borders), len(names), dtype=torch.float64)
        for k, report in own.items() if self.replica == 0 else ():
            values[k] = torch.tensor([report[name] for name in names], dtype=torch.float64)
        reports = [dict(zip(names, row, strict=True)) for row in self.processes.sum(values).tolist()]
        if self.processes.rank == 0:
            warn_of_collapse(reports)
        return reports

    def _share(self, rows: Tensor) -> Tensor:
        """The part of the rows that belongs to this replica."""
        return rows.tensor_split(self.replicas)[self.replica]

    def _training_batches(self, epoch: int, *, begin: int) -> Iterator[Batch]:
        if 0 in self.blocks:
            batches = self.experiment.training_batches(epoch, begin=begin)
            return ((self._share(x), self._share(y)) for x, y in batches)
        return ((None, self._share(y)) for y in self.experiment.training_labels(epoch, begin=begin))

    def _scores(self, split: Split) -> Iterator[tuple[slice, Tensor]]:
        """Scores (blocks, rows, ...) of this process's exits, for this replica's rows of the split."""
        share = self._share(torch.arange(len(split)))
        predictions, first = self.pipeline.predict(self._ordered_batches(split.of(share))), int(share[0])
        while True:
            with self.experiment.autocast(self.device):
                given = next(predictions, None)
            if given is None:
                break
            found = self.experiment.task.grading.scores(given).cpu()
            yield slice(first, first := first + found.shape[1]), found

    def _ordered_batches(self, split: Split) -> Iterator[Batch]:
        if 0 in self.blocks:
            return self.experiment.task.ordered_batches(split)
        return ((None, y) for y in split.labels.split(self.experiment.task.evaluated_at_once))

    def _placement(self, mesh: DeviceMesh) -> Placement:
        train = self.experiment.dataset.train
        rows = slice(min(self.settings.batch_size // self.replicas, MEASURED))
        x = self.experiment.task.prepared(train.inputs[rows])
        with self.experiment.autocast(self.device):
            return balanced(self.learner, x, train.labels[rows], mesh=mesh, device=self.device)

    def _follow_schedule(self, stage: Stage) -> None:
        def set_rate_of_minibatch(optimizer: Optimizer, *_: object) -> None:
            set_rate(optimizer, self.experiment.learning_rate(stage.minibatch))

        if stage.optimizer is not None:
            stage.optimizer.register_step_pre_hook(set_rate_of_minibatch)
