"""Blocks one at a time from stored activations, against all blocks together: accuracy, seconds and bytes.

    python benchmarks/greedy.py [--seeds 3] [--views 4] [--dtype bf16] [--folder runs/greedy] DATA OPTIONS

OPTIONS are those of bll train, the same for both. For each seed the commands `bll train`, and `bll train --only`,
`bll cache` and `bll merge`, run one after another; a cache is removed as soon as the next block has been trained on it.
The last lines are one JSON object for each seed and way: seconds is the time of training, cache_seconds that of writing
the activations with the start of the command, bytes the size of the largest cache.

    python benchmarks/greedy.py ../shared/data/cifar10 --model resnet20 --blocks 4 --epochs 15
    python benchmarks/greedy.py text:../shared/data/tinyshakespeare.txt --model gpt-small --blocks 4
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any


def bll(*args: str) -> dict[str, Any]:
    """The last line of a command, as an object."""
    done = subprocess.run([sys.executable, "-m", "blocklocal", *args], stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def together(folder: Path, options: list[str]) -> dict[str, Any]:
    found = bll("train", *options, "--out", str(folder))
    return {"way": "together", "cache_seconds": 0.0, "bytes": 0} | found


def one_at_a_time(folder: Path, options: list[str], *, views: int, dtype: str) -> dict[str, Any]:
    seconds, writing, largest = 0.0, 0.0, 0
    runs: list[Path] = []
    cache, blocks = None, 1
    while len(runs) < blocks:
        k = len(runs)
        runs.append(folder / f"block{k}")
        source = ["--from", str(cache)] if cache else options
        trained = bll("train", "--only", str(k), *source, "--out", str(runs[k]))
        seconds, blocks = seconds + trained["seconds"], trained["blocks"]
        before, cache = cache, folder / f"cache{k}"
        if k < blocks - 1:
            start = time.perf_counter()
            asked = ["--views", str(views)] if k == 0 else []
            written = bll("cache", str(runs[k]), "--yes", "--dtype", dtype, *asked, "--out", str(cache))
            writing, largest = writing + time.perf_counter() - start, max(largest, written["bytes"])
        if before:
            shutil.rmtree(before)
    found = bll("merge", *map(str, runs), "--out", str(folder / "merged"))
    return {"way": f"one at a time, {views} views in {dtype}", **found} | {
        "seconds": round(seconds, 3),
        "cache_seconds": round(writing, 3),
        "bytes": largest,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--views", type=int, default=4)
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="bf16")
    parser.add_argument("--folder", type=Path, default=Path("runs/greedy"))
    chosen, options = parser.parse_known_args()
    lines: list[dict[str, Any]] = []
    for seed in range(chosen.seeds):
        folder, seeded = chosen.folder / f"seed{seed}", [*options, "--seed", str(seed)]
        lines.append({"seed": seed, **together(folder / "together", seeded)})
        lines.append({"seed": seed, **one_at_a_time(folder, seeded, views=chosen.views, dtype=chosen.dtype)})
    for line in lines:
        print(json.dumps(line))


if __name__ == "__main__":
    main()
