"""Blocks that were trained alone, put together into one run."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from blocklocal.lab import outputs
from blocklocal.lab.environment import describe
from blocklocal.lab.errors import UserError
from blocklocal.lab.one_block.folder import ELSEWHERE, BlockRun, digest_of, trained_on, weights_of
from blocklocal.lab.runs.folder import Run
from blocklocal.lab.settings import Settings, flag
from blocklocal.lab.tasks.measure import Measure
from blocklocal.lab.training.experiment import Experiment, check_data, prepare
from blocklocal.lab.training.trained import load_tested


@dataclass(frozen=True)
class Chain:
    """All blocks of a model in order, each trained on what those before it give. digests: of their weights."""

    runs: tuple[BlockRun, ...]
    digests: tuple[str, ...]

    @property
    def settings(self) -> Settings:
        return self.runs[0].settings()


def chain_of(paths: Sequence[Path]) -> Chain:
    """The blocks in these folders, in any order.

    UserError: a block is missing, there twice, or not trained to its end; one was trained with other settings, on other
    data, or on the activations of other blocks.
    """
    found = sorted(((BlockRun(path).block, BlockRun(path)) for path in paths), key=lambda pair: pair[0])
    runs, blocks = tuple(run for _, run in found), found[0][1].facts()["blocks"]
    for k in range(max(blocks, len(found))):
        holders = [str(run.path) for block, run in found if block == k]
        if len(holders) != 1:
            what = f"block {k} is missing" if not holders else f"{' and '.join(map(repr, holders))} both hold block {k}"
            raise UserError(f"{what}: one folder for each of the {blocks} blocks is needed")
    first, facts = runs[0].settings(), runs[0].facts()
    digests = tuple(digest_of(run.weights()) for run in runs)
    for k, run in enumerate(runs):
        _check_one(run, first, facts)
        upstream = run.upstream
        read = [] if upstream is None else upstream["blocks"]
        if len(read) != k:
            raise UserError(f"{str(run.config)!r} is not that of block {k}: it names {len(read)} blocks before it")
        for j, digest in enumerate(read):
            if digest != digests[j]:
                raise UserError(
                    f"block {k} in {str(run.path)!r} was trained on activations of another block {j} than that in "
                    f"{str(runs[j].path)!r}: train it on a cache of that one, or merge the one that it was trained on"
                )
    return Chain(runs, digests)


def load_chain(chain: Chain, *, data: str | None, device: str) -> Experiment:
    """The whole model with the weights of the blocks. UserError: it does not fit them; the data are others."""
    settings = replace(chain.settings, data=data or chain.settings.data, device=device)
    experiment = prepare(settings)
    check_data(experiment.task, chain.runs[0].facts())
    if len(experiment.learner.blocks) != len(chain.runs):
        raise UserError(f"the model as it is built now has {len(experiment.learner.blocks)} blocks: restore its code")
    for k, run in enumerate(chain.runs):
        load_tested(experiment, run.kept(), minibatch=_end(run), blocks=(k,))
        if digest_of(weights_of(experiment.learner, k)) != chain.digests[k]:
            raise UserError(f"{str(run.checkpoints)!r} is not the checkpoint of {str(run.model)!r}: restore the folder")
    return experiment


def save_chain(chain: Chain, experiment: Experiment, out: Path) -> list[dict[str, Any]]:
    """Write the folder of the run, after a test of all exits; returns the records of its epochs.

    UserError: there is something in that place. OSError: the folder was not written, and nothing is left.
    """
    if os.path.lexists(out) and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"--out {str(out)!r} is not empty: choose another folder")
    records = _records(chain, experiment)
    with outputs.room(out.absolute().parent, flag="--out"), _beside(out) as beside:
        run = Run(Path(beside, "run"))
        run.create(replace(chain.settings, data=experiment.settings.data), facts=_facts(chain, experiment))
        for k, block in enumerate(chain.runs):
            part = Path(f"step-{_end(block)}", f"block-{k}")
            shutil.copytree(block.checkpoints / part, run.checkpoints / part)
        for record in records:
            run.append(record)
        run.save_model(experiment.learner.model)
        run.path.replace(out)
    return records


def _beside(out: Path) -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.absolute().parent, ignore_cleanup_errors=True)


def _check_one(run: BlockRun, first: Settings, facts: dict[str, Any]) -> None:
    """UserError: a block with other settings or data than the first, or whose record was changed."""
    own, settings = run.facts(), run.settings()
    changed = [name for name in first.contradictions(settings) if name not in map(flag, ELSEWHERE)]
    if changed:
        raise UserError(f"{str(run.path)!r} was trained with other {', '.join(changed)} than block 0")
    for name in ("data", "blocks", "steps"):
        if own[name] != facts[name]:
            raise UserError(f"{str(run.path)!r} was trained with other {name} than block 0")
    if own["trained_on"] != trained_on(settings, own["data"], own["upstream"]):
        raise UserError(f"{str(run.config)!r} was changed after the training: restore it from a copy")
    if run.kept().latest() != _end(run) or len(run.records()) != settings.epochs:
        raise UserError(f"{str(run.path)!r} lacks the checkpoint or the record of its end: restore it from a copy")


def _end(run: BlockRun) -> int:
    """The number of minibatches of the whole training."""
    return run.settings().epochs * run.facts()["steps"]


def _facts(chain: Chain, experiment: Experiment) -> dict[str, Any]:
    """config.json. merged: of each block, the digests of its weights and of what it was trained on."""
    merged = [
        {"weights": digest, "trained_on": run.facts()["trained_on"]}
        for run, digest in zip(chain.runs, chain.digests, strict=True)
    ]
    return {
        "data": experiment.task.facts,
        "parameters": sum(parameter.numel() for parameter in experiment.learner.model.parameters()),
        "blocks": len(chain.runs),
        "steps": experiment.steps,
        "processes": 1,
        "merged": merged,
    } | describe(experiment.device)


def _records(chain: Chain, experiment: Experiment) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl: of each block its own epochs; the last epoch is tested as a whole."""
    measures = experiment.task.grading.measures
    records = [_together(epoch, measures) for epoch in zip(*(run.records() for run in chain.runs), strict=True)]
    held_out, exits = experiment.validate(), experiment.test()
    records[-1] |= exits.record
    if held_out is not None:
        records[-1] |= {**held_out.validation_record, "exit_weights": list(experiment.learner.pool.weights)}
    return records


def _together(parts: Sequence[dict[str, Any]], measures: Sequence[Measure]) -> dict[str, Any]:
    """The record of an epoch of all blocks, one after another."""
    return {
        "epoch": parts[0]["epoch"],
        "train_loss": [part["train_loss"][0] for part in parts],
        **{f"test_{measure.name}": [measure.exit(part) for part in parts] for measure in measures},
        "seconds": round(sum(part["seconds"] for part in parts), 3),
        "peak_memory_mib": max(part["peak_memory_mib"] for part in parts),
        "borders": [part["border"] for part in parts[:-1]],
    }
