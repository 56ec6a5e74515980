"""`bll bench --pipeline`: a chain of blocks in one process, block-local over several, by GPipe, 1F1B and replicas.

Every process computes with one thread. The contenders take turns, round after round, so that a machine which is slow
for a while is so for all; what counts is the median. Times are those of a full pipeline.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Annotated, Any, Literal

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch.distributed.pipelining import Schedule1F1B, ScheduleGPipe
from torch.multiprocessing.spawn import start_processes
from tyro.conf import FlagCreatePairsOff

from blocklocal import BLL, BLL_PAPER
from blocklocal.lab import calibration
from blocklocal.lab.arguments import parse
from blocklocal.lab.environment import keep_freed_memory
from blocklocal.lab.errors import UserError
from blocklocal.lab.pipeline_contenders import (
    EndToEnd,
    Progress,
    Replicas,
    backpropagation,
    blocks_alone,
    blocks_in_a_pipeline,
    learner,
    optimizer,
)
from blocklocal.lab.pipeline_models import CHAINS, Chain
from blocklocal.pipeline import Pipeline
from blocklocal.pipeline.programs import block_local, data_parallel, gpipe, one_forward_one_backward
from blocklocal.pipeline.timeline import Timeline
from blocklocal.pipeline.trace import Record

LOSSES = {"bll": BLL, "bll-paper": BLL_PAPER}
MESSAGES = {"fp32": torch.float32, "bf16": torch.bfloat16}
BLOCKS, ALONE = "block-local", "block-local, alone"
REPLICAS = "data parallel"
AT_ONCE = "block-local, alone in each"  # process at the same time: what they take from each other by being there
SCHEDULES = {"GPipe": (ScheduleGPipe, gpipe), "1F1B": (Schedule1F1B, one_forward_one_backward)}


@dataclass(frozen=True)
class Options:
    """Milliseconds per minibatch of blocks over processes, beside one process, GPipe, 1F1B and data parallelism."""

    model: Literal["mlp", "cnn", "devices"] = "mlp"
    """four blocks of Linear(1024); four of convolutions; or a block per process that sleeps instead of computing"""
    processes: int = 2
    """processes, of one thread each"""
    rule: Literal["bll", "bll-paper"] = "bll-paper"
    """local loss at the borders"""
    message: Literal["fp32", "bf16"] = "fp32"
    """what travels between blocks"""
    microbatches: tuple[int, ...] = (2, 4, 8)
    """of GPipe and 1F1B, the latter with at least as many as processes"""
    minibatches: int = 16
    """measured minibatches per round of a pipeline, after the first 8"""
    rounds: int = 5
    """how often each contender has its turn"""
    interface: str = "lo"
    """network interface for the messages"""
    json: Annotated[bool, FlagCreatePairsOff] = False
    """print one JSON object as the last line"""

    @property
    def end_to_end(self) -> list[tuple[str, int]]:
        """Schedules, and their microbatches."""
        return [(name, m) for name in SCHEDULES for m in self.microbatches if name == "GPipe" or m >= self.processes]


def main(args: Sequence[str]) -> None:
    options = parse(Options, args, prog="bll bench --pipeline")
    if not 2 <= options.processes <= 16 or (options.model != "devices" and options.processes > 4):
        raise UserError(f"--processes {options.processes}: 2 to 4 for the four blocks of a model, to 16 for devices")
    result = bench(options)
    if os.environ.get("RANK", "0") != "0":
        return
    Console().print(table(result))
    if options.json:
        print(json.dumps(result))


def bench(options: Options) -> dict[str, Any]:
    """Seconds per minibatch, round by round, and what the simulator says, by contender.

    Where RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT are set, this is one of the processes, and there may be a
    network between them; otherwise it starts them all.
    """
    os.environ["GLOO_SOCKET_IFNAME"] = options.interface
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
        return measure(options)
    with tempfile.TemporaryDirectory() as folder:
        get_context("forkserver").set_forkserver_preload(["torch", "blocklocal.pipeline"])
        start_processes(_start, (options, folder), nprocs=options.processes, start_method="forkserver")
        return json.loads(Path(folder, "result.json").read_text())


def measure(options: Options) -> dict[str, Any]:
    """The result, in the processes of the default group; every one of them gets it."""
    torch.set_num_threads(1)
    keep_freed_memory()
    torch.manual_seed(0)
    chain, loss = CHAINS[options.model](options.processes), LOSSES[options.rule]
    message = MESSAGES[options.message]
    pipeline = Pipeline(learner(chain, loss), optimizer=optimizer, message=message, trace=True)
    alone = {"backpropagation, alone": backpropagation(chain), ALONE: blocks_alone(chain, loss)}
    together = {f"{name}, M={m}": EndToEnd(chain, SCHEDULES[name][0], microbatches=m) for name, m in options.end_to_end}
    replicas, trace = iter(Replicas(chain)), pipeline.trace
    assert trace is not None
    seconds: dict[str, list[float]] = {name: [] for name in (*alone, AT_ONCE, BLOCKS, *together, REPLICAS)}
    traces: list[list[Record]] = []
    clocks: dict[str, list[list[float]]] = {name: [] for name in together}
    for turn in range(1 + options.rounds):
        for name, progress in alone.items():
            mine = progress if dist.get_rank() == 0 else None
            seconds[name].append(_turn(mine, minibatches=options.minibatches // 2))
        seconds[AT_ONCE].append(_turn(alone[ALONE], minibatches=options.minibatches // 2))
        trace.records.clear()
        seconds[BLOCKS].append(_turn(blocks_in_a_pipeline(pipeline, chain), minibatches=options.minibatches))
        traces.append(list(trace.records))
        for name, contender in together.items():
            contender.stage.seconds.clear()
            seconds[name].append(_turn(iter(contender), minibatches=options.minibatches // 2))
            clocks[name] += contender.stage.seconds[1:] if turn else []
        seconds[REPLICAS].append(_turn(replicas, minibatches=options.minibatches // 2))
    simulation = _simulate(chain, pipeline, [record for records in traces[1:] for record in records], clocks, options)
    measured = {name: found[1:] for name, found in seconds.items()}
    waiting = torch.zeros(options.processes, dtype=torch.float64)
    waiting[dist.get_rank()] = median(Timeline(records).waiting(dist.get_rank()) for records in traces[1:])
    dist.all_reduce(waiting)
    return {"options": asdict(options), "seconds": measured, **simulation, "waiting": waiting.tolist()}


def _start(rank: int, options: Options, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=options.processes)
    result = measure(options)
    if rank == 0:
        Path(folder, "result.json").write_text(json.dumps(result))
    dist.barrier()
    dist.destroy_process_group()


def table(result: dict[str, Any]) -> Table:
    rows = Table(title=f"{result['options']['model']}: ms per minibatch", title_justify="left")
    for column in ("", "median", "least", "most", "simulated", "of block-local"):
        rows.add_column(column, justify="right" if column else "left")
    pace = median(result["seconds"][BLOCKS])
    for name, seconds in result["seconds"].items():
        simulated = result["simulated"].get(name)
        rows.add_row(
            name,
            *(f"{1e3 * value:.1f}" for value in (median(seconds), min(seconds), max(seconds))),
            f"{1e3 * simulated:.1f}" if simulated else "",
            f"{median(seconds) / pace:.2f}",
        )
    shares = ", ".join(f"{share:.1%}" for share in result["waiting"])
    alone, at_once = (median(result["seconds"][name]) for name in (ALONE, AT_ONCE))
    rows.caption = (
        f"block-local: {alone / pace:.2f} times as fast as alone; {result['options']['processes']} processes that have "
        f"nothing to do with each other are {result['options']['processes'] * alone / at_once:.2f} times as fast as one"
        f"\nthe processes wait {shares} of the time from their first to their last minibatch"
    )
    return rows


def _turn(progress: Progress | None, *, minibatches: int) -> float:
    """Seconds per minibatch of the slowest process, once the first minibatches are done."""
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
    chain: Chain, pipeline: Pipeline, records: list[Record], clocks: dict[str, list[list[float]]], options: Options
) -> dict[str, Any]:
    link, outputs, placement = calibration.link(), calibration.outputs(chain), pipeline.placement
    scale = MESSAGES[options.message].itemsize / 4
    costs = calibration.block_costs(records, blocks=len(chain.blocks), messages=[scale * size for size in outputs])
    simulated = {BLOCKS: block_local(costs, link=link, placement=placement)}
    borders = [outputs[placement.blocks(rank)[-1]] for rank in range(placement.size)]
    for name, m in options.end_to_end:
        stages = calibration.stage_costs(clocks[f"{name}, M={m}"], messages=borders)
        simulated[f"{name}, M={m}"] = SCHEDULES[name][1](stages, microbatches=m, link=link)
    simulated[REPLICAS] = data_parallel([calibration.replica_cost(chain)], workers=placement.size, link=link)
    return {"simulated": simulated, "link": asdict(link)}
