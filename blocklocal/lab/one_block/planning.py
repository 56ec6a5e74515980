"""A trained block, and what a cache of its activations is to hold."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from blocklocal.lab.errors import UserError
from blocklocal.lab.one_block.activations import Activations
from blocklocal.lab.one_block.contents import FEATURES, Contents, Part
from blocklocal.lab.one_block.folder import ELSEWHERE, BlockRun, digest_of
from blocklocal.lab.one_block.options import Request
from blocklocal.lab.one_block.run import opened
from blocklocal.lab.one_block.source import Source
from blocklocal.lab.one_block.writing import outputs_of
from blocklocal.lab.runs.block_state import load_block_state
from blocklocal.lab.settings import encode
from blocklocal.lab.training.experiment import Experiment, check_data
from blocklocal.lab.training.recipes import refuse_code

FILE_BYTES = 2**26


@dataclass(frozen=True)
class TrainedBlock:
    """Block `block` with its trained weights, and what it reads. digest: of these weights."""

    run: BlockRun
    block: int
    experiment: Experiment
    source: Source
    digest: str
    upstream: Activations | None


def load_block(path: Path, *, upstream: Path | None, data: str | None, device: str, trust: bool) -> TrainedBlock:
    """Load a block that was trained alone. upstream, data: other locations of what it reads.

    UserError: no such block, or not trained to its end; what it has read is missing, or another.
    """
    run = BlockRun(path)
    settings, facts, weights = run.settings(), run.facts(), run.weights()
    if not trust:
        refuse_code(settings, run=path)
    k, known, cache = facts["block"], facts["upstream"], None
    settings = replace(settings, device=device, data=data or settings.data)
    if k == facts["blocks"] - 1:
        raise UserError(f"{str(path)!r} holds block {k}, the last: no block reads what it gives")
    if (known is None) != (upstream is None) and known is None:
        raise UserError(f"{str(path)!r} holds block 0, which reads the data: leave --from out")
    if known is not None:
        cache = Activations(upstream or Path(known["path"]))
        if cache.digest != known["digest"]:
            raise UserError(f"--from {str(cache.path)!r} is not the cache on which {str(path)!r} was trained")
    experiment, source = opened(Request(k, settings, cache))
    if cache is None:
        check_data(experiment.task, facts)
    load_block_state(experiment.learner, k, None, dict(weights))
    return TrainedBlock(run, k, experiment, source, digest_of(weights), cache)


def plan_contents(block: TrainedBlock, *, dtype: Literal["fp32", "bf16"], views: int) -> Contents:
    """What the cache behind a block is to hold. views: 0 for one, or for as many as the block has read.

    UserError: more views than the block has read; activations of a dtype that cannot be stored.
    """
    experiment, cache = block.experiment, block.upstream
    settings, task = experiment.settings, experiment.task
    views = views or (cache.contents.views if cache else 1)
    if cache and views > cache.contents.views:
        raise UserError(
            f"--views {views}: the cache {str(cache.path)!r}, which block {block.block} reads, has "
            f"{cache.contents.views}: store more there first"
        )
    if views > settings.epochs:
        raise UserError(f"--views {views} is out of range: 1 to the {settings.epochs} epochs of the run")
    h, y = next(outputs_of(experiment, block.block, block.source.training(1)))
    features = str(h.dtype).removeprefix("torch.")
    if features not in FEATURES:
        raise UserError(f"block {block.block} gives {features}, and {', '.join(FEATURES)} can be stored")
    held_out = task.dataset.validation
    ordered = {"test": task.dataset.test} | ({"validation": held_out} if held_out is not None else {})
    return Contents(
        border=block.block,
        dtype=dtype,
        features=features,  # pyright: ignore[reportArgumentType] (one of these)
        shape=tuple(h.shape[1:]),
        targets=tuple(y.shape[1:]),
        parts=(
            *(
                Part(f"view-{v}", experiment.steps * settings.batch_size, settings.batch_size)
                for v in range(1, views + 1)
            ),
            *(Part(name, len(split), task.evaluated_at_once) for name, split in ordered.items()),
        ),
        file_bytes=FILE_BYTES,
        settings={name: value for name, value in encode(settings).items() if name not in ELSEWHERE}
        | {name: encode(block.run.settings())[name] for name in ELSEWHERE},
        data=block.run.facts()["data"],
        blocks=(*(cache.contents.blocks if cache else ()), block.digest),
        upstream=cache.digest if cache else None,
        target_dtype="float32" if y.is_floating_point() else "int64",
    )
