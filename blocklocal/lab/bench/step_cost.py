"""The cost of a training step under several settings, measured in turn in one process, against backpropagation."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from blocklocal.lab import outputs
from blocklocal.lab.bench.baselines import Baseline
from blocklocal.lab.bench.measure import Measurement, Watch, measure_all, ratio
from blocklocal.lab.bench.step_memory import measure
from blocklocal.lab.environment import find_device
from blocklocal.lab.errors import UserError
from blocklocal.lab.runs.schema import convert_to, read
from blocklocal.lab.settings import Settings, encode
from blocklocal.lab.training.experiment import prepare

ROUNDS, WARMUP = 10, 2


@dataclass(frozen=True)
class Cost:
    """The cost of one training step, relative to backpropagation.

    time: processor seconds, as the median over rounds of the ratio within a round. operations: of matrix products and
    convolutions. memory: the most bytes of tensors that it adds.
    """

    time: float
    operations: float
    memory: float


def costs(settings: Mapping[str, Settings], *, file: Path, watch: Watch = lambda _: None) -> dict[str, Cost]:
    """Read the costs from a file if it has those of the same settings; otherwise measure them and write the file.

    The costs are relative to the first settings with rule bp. UserError: there are none.
    """
    wanted = {name: encode(one) for name, one in settings.items()}
    found = _kept(file)
    if found is not None and found["settings"] == json.loads(json.dumps(wanted)):
        return {name: convert_to(cost, Cost) for name, cost in found["costs"].items()}
    reference = next((name for name, one in settings.items() if one.rule == "bp"), None)
    if reference is None:
        raise UserError('a study compares with backpropagation: add {"rule": "bp"} to the grid')
    baselines = {}
    for name, one in settings.items():
        watch(f"preparing {name}")
        baselines[name] = baseline(one)
    device = find_device(settings[reference].device)
    measured = measure_all(baselines, device=device, rounds=ROUNDS, warmup=WARMUP, watch=watch)
    result = {name: _cost(measurement, bp=measured[reference]) for name, measurement in measured.items()}
    content = json.dumps({"settings": wanted, "costs": {name: asdict(cost) for name, cost in result.items()}}, indent=2)
    outputs.write(file, lambda part: part.write_text(content))
    return result


def step_memory(settings: Settings) -> float:
    """The most bytes of tensors that a training step with these settings adds."""
    made = baseline(settings)
    made.step()  # creates the optimizer state
    return measure(made.step, parts=made.parts).alive


def _cost(measurement: Measurement, *, bp: Measurement) -> Cost:
    return Cost(
        time=ratio(measurement.processor_seconds, bp.processor_seconds),
        operations=measurement.flops / bp.flops,
        memory=measurement.step_memory.alive / bp.step_memory.alive,
    )


def baseline(settings: Settings) -> Baseline:
    """The step of a run with these settings, on its first minibatch."""
    experiment = prepare(_small(settings))
    learner, learning = experiment.learner, experiment.learning
    x, y = next(experiment.training_batches(1))
    optimizers = [experiment.optimizer(learner.block_parameters(k)) for k in range(len(learner.blocks))]

    def step() -> None:
        with experiment.autocast(), learning.with_targets(y):
            learner.backward(x, y, optimizers=optimizers)

    return Baseline(settings.rule, learner, optimizers, step, list(learner.blocks), learner.compile)


def _small(settings: Settings) -> Settings:
    """The settings with only as many images as a step needs."""
    return replace(settings, train_size=settings.batch_size * settings.accumulate, test_size=1, validation=0)


def _kept(file: Path) -> dict[str, Any] | None:
    """The content of the file. UserError: a file that this module has not written."""
    if not file.exists():
        return None
    try:
        found = json.loads(read(file))
        for cost in found["costs"].values():
            convert_to(cost, Cost)
        return {"settings": found["settings"], "costs": found["costs"]}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{str(file)!r} holds no costs ({error}): remove it to measure them again") from error
