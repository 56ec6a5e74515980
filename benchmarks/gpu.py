"""`make gpu`: what the docs say of a GPU, measured on the one of this machine, in the order of its worth.

Every row is a command. What it finds is kept in one folder: NAME.json, or for a training run a folder with its
config.json and metrics.jsonl. A row that is there is passed over, so that the same command goes on where it was cut
off; runs go on from their last checkpoint.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
KEPT = ("config.json", "metrics.jsonl")  # of a training run
NINE = "layer1.0 layer1.1 layer1.2 layer2.0 layer2.1 layer2.2 layer3.0 layer3.1"  # ResNet-20, a block for each unit


@dataclass(frozen=True)
class Row:
    """One command of `bll`, or of pytest. name: of what it leaves. alone: nothing may run at the same time."""

    name: str
    command: str
    alone: bool = True

    @property
    def trains(self) -> bool:
        return self.command.startswith("train ")


def benches() -> Iterator[Row]:
    """Seconds and memory of a step."""
    common = "--dtype bf16 --channels-last --rules bp,bp-checkpoint,bll --json"
    for model, size in (("resnet18", 512), ("resnet50", 256)):
        for head in ("", " --head linear"):
            for compiled in ("", " --compile"):
                name = f"bench-{model}{head.replace(' --head ', '-')}{compiled.replace(' --', '-')}"
                yield Row(name, f"bench --model {model} --batch-size {size} {common}{head}{compiled}")
    yield Row("bench-resnet110", f"bench --model resnet110 --blocks 4,8,16 --batch-size 512 {common}")


def checks() -> Iterator[Row]:
    """The tests that need a GPU: no step waits for it, and neither NCCL nor blocks in host memory change anything."""
    files = (f"tests/test_{name}.py" for name in ("step", "launch", "offload", "offload_train"))
    yield Row("tests", f"pytest -q -k gpu {' '.join(files)}")


def runs() -> Iterator[Row]:
    """Accuracy: backpropagation beside the rules in blocks."""
    for model, epochs in (("resnet18", 10), ("resnet50", 4)):
        for rule in ("bp", "bll"):
            schedule = f"--epochs {epochs} --schedule onecycle --dtype bf16 --channels-last"
            yield _run(f"cifar10-{model}-{rule}-seed0", f"cifar10 --model {model} --rule {rule} {schedule}")
    rows = {
        "bp": "--rule bp",
        "bll-k4": "--rule bll --blocks 4",
        "bll-k4-trained": "--rule bll --blocks 4 --lookahead trained",
        "bll-k9": f"--rule bll --at {NINE}",
    }
    for data in ("cifar10", "cifar100"):
        for seed in range(3):
            for name, options in rows.items():
                shared = "--model resnet20 --epochs 15 --validation 2500 --channels-last"
                yield _run(f"{data}-resnet20-{name}-seed{seed}", f"{data} {shared} {options} --seed {seed}")


def _run(name: str, command: str) -> Row:
    return Row(f"gpu-{name}", f"train DATA/{command} --device cuda --threads 1", alone=False)


class Session:
    """The rows that are still to be done, in the time that is left."""

    def __init__(self, *, data: Path, out: Path, work: Path, minutes: float) -> None:
        self.data, self.out, self.work = data, out, work
        self.end = time.monotonic() + 60 * minutes

    def do(self, rows: Sequence[Row], *, at_once: int) -> list[str]:
        """The names of rows that are not done: cut off, or failed."""
        self.out.mkdir(parents=True, exist_ok=True)
        self.work.mkdir(parents=True, exist_ok=True)
        alone = [row for row in rows if row.alone]
        missing = [row.name for row in alone if not self._row(row)]
        with ThreadPoolExecutor(at_once) as pool:
            others = [row for row in rows if not row.alone]
            done = pool.map(self._row, others)
            return missing + [row.name for row, finished in zip(others, done, strict=True) if not finished]

    def _row(self, row: Row) -> bool:
        target = self.out / (row.name if row.trains else f"{row.name}.json")
        if target.exists():
            return True
        if time.monotonic() >= self.end:
            return False
        begin = time.monotonic()
        output = self._call(row)
        if output is None:
            return False
        part = self.work / f"{target.name}.part"
        shutil.rmtree(part, ignore_errors=True)
        if row.trains:
            part.mkdir()
            for name in KEPT:
                shutil.copy(self.work / row.name / name, part)
        else:
            lines = output.strip().splitlines()
            found = json.loads(lines[-1]) if row.command.startswith("bench ") else {"output": lines[-1]}
            part.write_text(json.dumps({"command": row.command, **found}, indent=2) + "\n")
        part.replace(target)
        print(f"{row.name}: {time.monotonic() - begin:.0f} s", flush=True)
        return True

    def _call(self, row: Row) -> str | None:
        """What the command writes; None where it fails or the time is up."""
        log = self.work / f"{row.name}.log"
        with log.open("ab") as said:
            process = subprocess.Popen(
                self._arguments(row), cwd=ROOT, stdout=subprocess.PIPE, stderr=said, text=True, start_new_session=True
            )
            try:
                output, _ = process.communicate(timeout=max(1.0, self.end - time.monotonic()))
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.communicate()
                print(f"{row.name}: cut off", flush=True)
                return None
        if process.returncode:
            with log.open("a") as said:
                said.write(output)
            print(f"{row.name}: failed, see {log}", flush=True)
            return None
        return output

    def _arguments(self, row: Row) -> list[str]:
        name, *rest = row.command.replace("DATA/", f"{self.data}/").split()
        if name == "pytest":
            return [sys.executable, "-m", name, *rest]
        if not row.trains:
            return [sys.executable, "-m", "blocklocal", name, *rest]
        folder = self.work / row.name
        if (folder / "checkpoint").exists():
            rest = ["--resume"]
        return [sys.executable, "-m", "blocklocal", name, *rest, "--out", str(folder)]


def tiny(row: Row) -> Row:
    """The same row in a few seconds of a CPU, to try this script."""
    if row.command.startswith("bench "):
        return Row(row.name, "bench --model mlp --batch-size 8 --size 8 --steps 1 --warmup 0 --rules bp,bll --json")
    if row.trains:
        return Row(row.name, "train digits --model mlp --epochs 1 --train-size 128 --threads 1", alone=False)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", type=Path, default=ROOT.parent / "shared" / "data", help="folder of cifar10, cifar100"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "gpu", help="what is found is kept here")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "gpu", help="checkpoints and logs")
    parser.add_argument("--minutes", type=float, default=25.0, help="nothing goes on for longer")
    parser.add_argument("--at-once", type=int, default=4, help="training runs that share the GPU")
    parser.add_argument("--only", default="", help="rows whose name begins with this")
    parser.add_argument("--tiny", action="store_true", help="every row in seconds, on any machine: to try this script")
    options = parser.parse_args()
    rows = [row for row in (*benches(), *checks(), *runs()) if row.name.startswith(options.only)]
    if options.tiny:
        rows = [tiny(row) for row in rows]
    session = Session(data=options.data, out=options.out, work=options.work, minutes=options.minutes)
    missing = session.do(rows, at_once=options.at_once)
    if missing:
        print(f"{len(missing)} of {len(rows)} rows are missing: {', '.join(missing)}; the same command goes on")
        sys.exit(1)


if __name__ == "__main__":
    main()
