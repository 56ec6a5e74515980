"""`bll bench`: time and memory of one training step, rule by rule, on the same model, batch and machine."""

from __future__ import annotations

import importlib
import json
from collections.abc import Sequence

from blocklocal.lab.arguments import parse
from blocklocal.lab.bench import scaling
from blocklocal.lab.bench.comparison import bench
from blocklocal.lab.bench.options import Options
from blocklocal.lab.bench.tables import tables
from blocklocal.lab.terminal import Terminal

PIPELINE = "--pipeline"


def main(args: Sequence[str]) -> None:
    if PIPELINE in args:  # imported only here, since it needs the runtime of one version of torch
        importlib.import_module("blocklocal.lab.pipeline_bench.bench").main([arg for arg in args if arg != PIPELINE])
        return
    options = parse(Options, args, prog="bll bench")
    run, show = (scaling.scale, scaling.tables) if options.scale else (bench, tables)
    with Terminal(stderr=True).status("measuring") as status:
        result = run(options, watch=lambda what: status.update(f"measuring {what}"))
    for table in show(result):
        Terminal().print(table, end="\n\n")
    if options.json:
        print(json.dumps(result))
