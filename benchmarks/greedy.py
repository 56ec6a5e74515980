"""Blocks one at a time from stored activations, against all blocks together: accuracy, seconds and bytes.

    python benchmarks/greedy.py [--seeds 0 1 2] [--views 4] [--dtype bf16] [--folder runs/greedy] DATA OPTIONS

OPTIONS are those of bll train, the same for both. For each seed the commands `bll train`, and `bll train --only`,
`bll cache` and `bll merge`, run one after another; a cache is removed as soon as the next block has been trained on it.
results.jsonl in the folder gets one JSON object for each seed and way, and what stands there is not run again: seconds
is the processor time of the training commands, cache_seconds that of writing the activations, both with the start of
the commands and all their threads, and bytes the size of the largest cache.

    python benchmarks/greedy.py ../shared/data/cifar10 --model resnet20 --blocks 4 --epochs 15
    python benchmarks/greedy.py text:../shared/data/tinyshakespeare.txt --model gpt-small --blocks 4
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any


def bll(*args: str) -> tuple[dict[str, Any], float]:
    """The last line of a command, as an object, and the seconds of processor time that the command took."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-m", "blocklocal", *args], stdout=subprocess.PIPE, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return json.loads(done.stdout.splitlines()[-1]), sum(after[:2]) - sum(before[:2])


def together(folder: Path, options: list[str]) -> dict[str, Any]:
    found, seconds = bll("train", *options, "--out", str(folder))
    return found | {"seconds": round(seconds, 1), "cache_seconds": 0.0, "bytes": 0}


def one_at_a_time(folder: Path, options: list[str], *, views: int, dtype: str) -> dict[str, Any]:
    seconds, writing, largest = 0.0, 0.0, 0
    runs: list[Path] = []
    cache, blocks = None, 1
    while len(runs) < blocks:
        k = len(runs)
        runs.append(folder / f"block{k}")
        source = ["--from", str(cache)] if cache else options
        trained, took = bll("train", "--only", str(k), *source, "--out", str(runs[k]))
        seconds, blocks = seconds + took, trained["blocks"]
        before, cache = cache, folder / f"cache{k}"
        if k < blocks - 1:
            asked = ["--views", str(views)] if k == 0 else []
            written, took = bll("cache", str(runs[k]), "--yes", "--dtype", dtype, *asked, "--out", str(cache))
            writing, largest = writing + took, max(largest, written["bytes"])
        if before:
            shutil.rmtree(before)
    found, _ = bll("merge", *map(str, runs), "--out", str(folder / "merged"))
    return found | {"seconds": round(seconds, 1), "cache_seconds": round(writing, 1), "bytes": largest}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--views", type=int, default=4)
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="bf16")
    parser.add_argument("--folder", type=Path, default=Path("runs/greedy"))
    chosen, options = parser.parse_known_args()
    ways = {
        "together": together,
        f"one at a time, {chosen.views} views in {chosen.dtype}": partial(
            one_at_a_time, views=chosen.views, dtype=chosen.dtype
        ),
    }
    results = chosen.folder / "results.jsonl"
    done = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    for seed, (way, run) in product(chosen.seeds, ways.items()):
        if any((line["seed"], line["way"]) == (seed, way) for line in done):
            continue
        folder = chosen.folder / f"seed{seed}-{way.split(',')[0].replace(' ', '-')}"
        shutil.rmtree(folder, ignore_errors=True)
        found = {"seed": seed, "way": way} | run(folder, [*options, "--seed", str(seed)])
        print(json.dumps(found), flush=True)
        with results.open("a") as file:
            file.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
