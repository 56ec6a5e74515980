"""`bll bench --pipeline`: a chain of blocks in one process, and over several: block-local, GPipe, 1F1B and replicas.

Every process computes with one thread.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Sequence
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import torch.distributed as dist
from rich.table import Table
from torch.multiprocessing.spawn import start_processes

from blocklocal.lab.arguments import parse
from blocklocal.lab.distributed.process_group import environment, loopback
from blocklocal.lab.pipeline_bench.measure import ALONE, AT_ONCE, BLOCKS, measure
from blocklocal.lab.pipeline_bench.options import Options
from blocklocal.lab.terminal import Terminal


def main(args: Sequence[str]) -> None:
    options = parse(Options, args, prog="bll bench --pipeline")
    options.check()
    result = bench(options)
    if os.environ.get("RANK", "0") != "0":
        return
    Terminal().print(table(result))
    if options.json:
        print(json.dumps(result))


def bench(options: Options) -> dict[str, Any]:
    """Measure seconds per minibatch, round by round, and simulate them, for each baseline.

    Where RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT are set, this is one of the processes, and there may be a
    network between them; otherwise it starts them all.
    """
    os.environ["GLOO_SOCKET_IFNAME"] = options.interface or loopback()
    if environment() is not None:
        dist.init_process_group("gloo")
        return measure(options)
    with tempfile.TemporaryDirectory() as folder:
        get_context("forkserver").set_forkserver_preload(["torch", "blocklocal.pipeline"])
        start_processes(_start, (options, folder), nprocs=options.processes, start_method="forkserver")
        return json.loads(Path(folder, "result.json").read_text())


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
        f"block-local: {alone / pace:.2f} times as fast as alone; {result['options']['processes']} independent "
        f"processes are {result['options']['processes'] * alone / at_once:.2f} times as fast as one"
        f"\nthe processes wait {shares} of the time from their first to their last minibatch"
    )
    return rows
