"""Measures seconds per minibatch of every baseline of the pipeline benchmark, and the costs behind them.

The baselines take turns, round after round, so that a temporary slowdown of the machine affects all; the median counts.
Times are those of a full pipeline.
"""

from __future__ import annotations

import time
from dataclasses import asdict
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

from blocklocal.lab.environment import keep_freed_memory
from blocklocal.lab.pipeline_bench import cost_model
from blocklocal.lab.pipeline_bench.baselines import (
    EndToEnd,
    Progress,
    Replicas,
    backpropagation,
    blocks_alone,
    blocks_in_a_pipeline,
    learner,
    optimizer,
)
from blocklocal.lab.pipeline_bench.options import MESSAGES, SCHEDULES, Options
from blocklocal.lab.pipeline_bench.workloads import CHAINS, Chain
from blocklocal.pipeline import Pipeline
from blocklocal.pipeline.analysis.programs import block_local, data_parallel
from blocklocal.pipeline.analysis.timeline import Timeline
from blocklocal.pipeline.trace import Record

BLOCKS, ALONE = "block-local", "block-local, alone"
REPLICAS = "data parallel"
AT_ONCE = "block-local, alone in each"  # process at the same time: what they take from each other by being there


def measure(options: Options) -> dict[str, Any]:
    """Measure in the processes of the default group; every one of them gets the result."""
    torch.set_num_threads(1)
    keep_freed_memory()
    torch.manual_seed(0)
    chain = CHAINS[options.model](options.processes)
    message = MESSAGES[options.message_dtype]
    pipeline = Pipeline(learner(chain, options.rule), optimizer=optimizer, message_dtype=message, trace=True)
    alone = {"backpropagation, alone": backpropagation(chain), ALONE: blocks_alone(chain, options.rule)}
    together = {f"{name}, M={m}": EndToEnd(chain, SCHEDULES[name][0], microbatches=m) for name, m in options.end_to_end}
    replicas, trace = iter(Replicas(chain)), pipeline.trace
    assert trace is not None
    seconds: dict[str, list[float]] = {name: [] for name in (*alone, AT_ONCE, BLOCKS, *together, REPLICAS)}
    traces: list[list[Record]] = []
    clocks: dict[str, list[list[list[float]]]] = {name: [] for name in together}
    for _ in range(1 + options.rounds):
        for name, progress in alone.items():
            mine = progress if dist.get_rank() == 0 else None
            seconds[name].append(_turn(mine, minibatches=options.minibatches // 2))
        seconds[AT_ONCE].append(_turn(alone[ALONE], minibatches=options.minibatches // 2))
        trace.records.clear()
        seconds[BLOCKS].append(_turn(blocks_in_a_pipeline(pipeline, chain), minibatches=options.minibatches))
        traces.append(list(trace.records))
        for name, baseline in together.items():
            baseline.stage.seconds.clear()
            seconds[name].append(_turn(iter(baseline), minibatches=options.minibatches // 2))
            clocks[name].append(baseline.stage.seconds[1:])
        seconds[REPLICAS].append(_turn(replicas, minibatches=options.minibatches // 2))
    simulation = _simulate(chain, pipeline, traces[1:], {name: found[1:] for name, found in clocks.items()}, options)
    measured = {name: found[1:] for name, found in seconds.items()}
    waiting = torch.zeros(options.processes, dtype=torch.float64)
    waiting[dist.get_rank()] = median(Timeline(records).waiting(dist.get_rank()) for records in traces[1:])
    dist.all_reduce(waiting)
    return {"options": asdict(options), "seconds": measured, **simulation, "waiting": waiting.tolist()}


def _turn(progress: Progress | None, *, minibatches: int) -> float:
    """Seconds per minibatch of the slowest process, after the first minibatches."""
    dist.barrier()
    pace = torch.zeros((), dtype=torch.float64)
    if progress is not None:
        next(progress)
        start, done = time.perf_counter(), 0
        while done < minibatches:
            done += next(progress)
        pace += (time.perf_counter() - start) / done
    dist.all_reduce(pace, op=dist.ReduceOp.MAX)
    return pace.item()


def _simulate(
    chain: Chain,
    pipeline: Pipeline,
    traces: list[list[Record]],
    clocks: dict[str, list[list[list[float]]]],
    options: Options,
) -> dict[str, Any]:
    """By baseline. traces, clocks: round by round; of a round counts what `_turn` counts."""
    rounds = [[r for r in records if r.minibatch >= records[0].minibatch + pipeline.window] for records in traces]
    link, outputs, placement = cost_model.link(), cost_model.outputs(chain), pipeline.placement
    scale = MESSAGES[options.message_dtype].itemsize / 4
    costs = cost_model.block_costs(rounds, blocks=len(chain.blocks), messages=[scale * size for size in outputs])
    simulated = {BLOCKS: block_local(costs, link=link, placement=placement)}
    borders = [outputs[placement.blocks(rank)[-1]] for rank in range(placement.size)]
    for name, m in options.end_to_end:
        stages = cost_model.stage_costs(clocks[f"{name}, M={m}"], messages=borders)
        simulated[f"{name}, M={m}"] = SCHEDULES[name][1](stages, microbatches=m, link=link)
    simulated[REPLICAS] = data_parallel([cost_model.replica_cost(chain)], workers=placement.size, link=link)
    return {"simulated": simulated, "link": asdict(link)}
