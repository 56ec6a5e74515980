"""A decoder whose weights, gradients and optimizer state are several times the memory allowed, trained from files.

One block at a time is in memory (`bll.FileStore`). Each way runs in a process of its own, whose memory beyond that of
the interpreter with all libraries loaded is limited by the system: by a control group, page cache included, where this
process may make one, else by RLIMIT_DATA. One line of JSON per way is printed, and appended to --out.

    python benchmarks/offload.py ../shared/data/tinyshakespeare.txt

"files" and "backprop" run under the limit, "files-free", "host" and "memory" without it: blocks from files, from host
memory, and never offloaded, for the time of a step.

    python benchmarks/offload.py ../shared/data/tinyshakespeare.txt --device cuda --ways host,memory,backprop

With --device cuda the blocks at work are on the GPU, --limit is one of its memory, and "host" is under it too.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

import blocklocal as bll
from blocklocal.lab.models.gpt import GPT

MIB = 2**20
OPTIMIZER = partial(torch.optim.AdamW, lr=3e-4, betas=(0.9, 0.99), weight_decay=0.1, fused=True)
ALLOCATION = {"MALLOC_MMAP_THRESHOLD_": str(MIB)}  # RLIMIT_DATA counts addresses: those of freed tensors are given back
CONTROL = Path("/sys/fs/cgroup")


def status(name: str) -> float:
    """A figure of this process in MiB, as the kernel reports it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(f"{name}:")).split()[1]) / 1024


def moved() -> dict[str, int]:
    """Bytes that this process has read from the disk, and written to it."""
    found = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return {"read": int(found["read_bytes"]), "written": int(found["write_bytes"])}


class Text:
    """Batches of random windows of a text, as numbers of its characters."""

    def __init__(self, path: Path, options: argparse.Namespace) -> None:
        text = path.read_text(encoding="utf-8")
        letters = sorted(set(text))
        self.ids, self.tokens = torch.tensor([letters.index(letter) for letter in text]), len(letters)
        self._shape, self._draws = (options.batch_size, options.context), torch.Generator().manual_seed(0)
        self._device = options.device

    def batch(self) -> tuple[torch.Tensor, torch.Tensor]:
        count, context = self._shape
        first = torch.randint(len(self.ids) - context - 1, (count, 1), generator=self._draws)
        places = first + torch.arange(context)
        return self.ids[places].to(self._device), self.ids[places + 1].to(self._device)


def built(text: Text, options: argparse.Namespace, *, device: str) -> bll.BlockLocal:
    with torch.device(device):
        model = GPT(
            tokens=text.tokens, context=options.context, width=options.width, depth=options.depth, heads=options.heads
        )
        example = torch.zeros(2, options.context, dtype=torch.int64)
    cuts = [f"blocks.{options.depth * k // options.blocks - 1}" for k in range(1, options.blocks)]
    return bll.BlockLocal(model, at=cuts, classes=text.tokens, example=example, loss=1.0 * bll.Predictive())


def steps(way: str, text: Text, options: argparse.Namespace, *, folder: Path) -> Any:
    """Train; yields the local losses of each step, or the loss of backpropagation."""
    if way == "backprop":
        model = GPT(
            tokens=text.tokens, context=options.context, width=options.width, depth=options.depth, heads=options.heads
        ).to(options.device)
        optimizer = OPTIMIZER(model.parameters())
        while True:
            x, y = text.batch()
            loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            yield [loss.item()]
    learner = built(text, options, device=options.device if way == "memory" else "meta")
    if way == "memory":
        optimizers = [OPTIMIZER(learner.block_parameters(k)) for k in range(options.blocks)]
    else:
        store = bll.HostStore() if way == "host" else bll.FileStore(folder)
        optimizers = learner.offload(store, optimizer=OPTIMIZER, device=options.device).optimizers
    while True:
        yield learner.backward(*text.batch(), optimizers=optimizers).tolist()


def sizes(text: Text, options: argparse.Namespace) -> dict[str, float]:
    """Bytes of weights, gradients and two moments, in MiB: of all, and of the largest block with its border."""
    learner = built(text, options, device="meta")
    blocks = [sum(4 * p.nbytes for p in learner.block_parameters(k)) for k in range(options.blocks)]
    return {
        "parameters": sum(p.numel() for p in learner.model.parameters()),
        "all_mib": sum(blocks) / MIB,
        "largest_block_mib": max(blocks) / MIB,
    }


def run(way: str, options: argparse.Namespace) -> None:
    """What one process does: warm up, be limited, train; prints one line of JSON per step, and one at the end."""
    torch.set_num_threads(options.threads)
    text = Text(options.text, options)
    small = argparse.Namespace(**{**vars(options), "width": 64, "depth": 2, "heads": 2, "blocks": 2})
    for other in ("files", "backprop"):  # loads the code that both need
        trial = steps(other, Text(options.text, small), small, folder=options.folder / "trial")
        for _ in range(2):
            next(trial)
        trial.close()
    shutil.rmtree(options.folder / "trial")
    found = sizes(text, options)
    own = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    if options.device != "cpu":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    if options.limit:
        if options.device != "cpu":
            total = torch.cuda.get_device_properties(options.device).total_memory
            torch.cuda.set_per_process_memory_fraction(options.limit * MIB / total)
        elif options.group:
            (options.group / "cgroup.procs").write_text(str(os.getpid()))
        else:
            limit = int((status("VmData") + options.limit) * MIB)
            resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    before, begun, seconds, losses = moved(), time.perf_counter(), [], []
    for _, values in zip(range(options.steps), steps(way, text, options, folder=options.folder), strict=False):
        seconds.append(time.perf_counter() - begun)
        begun = time.perf_counter()
        losses.append(values)
        print(
            json.dumps({"step": len(losses), "seconds": round(seconds[-1], 2), "losses": values}),
            file=sys.stderr,
            flush=True,
        )
    few = max(1, len(losses) // 5)
    first, last = torch.tensor(losses[:few]).mean(0), torch.tensor(losses[-few:]).mean(0)
    kept = seconds[1:] or seconds  # the first step initialises
    print(
        json.dumps(
            {
                **found,
                "steps": len(losses),
                "first_losses": first.tolist(),
                "last_losses": last.tolist(),
                "blocks_that_learn": int((last < first).sum()),
                "seconds_per_step": sum(kept) / len(kept),
                "interpreter_mib": own,
                "peak_beyond_mib": status("VmHWM") - own,
                "disk_per_step_mib": {name: (now - before[name]) / MIB / len(losses) for name, now in moved().items()},
                "device_peak_mib": torch.cuda.max_memory_allocated() / MIB if options.device != "cpu" else None,
            }
        )
    )


@contextmanager
def group(limit: int):
    """A control group with this limit in MiB, or None where none can be made; a function of what it has seen."""
    v1, v2 = CONTROL / "memory" / f"blocklocal-{os.getpid()}", CONTROL / f"blocklocal-{os.getpid()}"
    path = v1 if (CONTROL / "memory").is_dir() else v2
    names = ("memory.limit_in_bytes", "memory.max_usage_in_bytes") if path is v1 else ("memory.max", "memory.peak")
    try:
        path.mkdir()
        (path / names[0]).write_text(str(limit * MIB))
    except OSError:
        if path.is_dir():
            path.rmdir()
        yield None, dict
        return
    try:
        yield path, lambda: {"group_peak_mib": int((path / names[1]).read_text()) / MIB}
    finally:
        path.rmdir()


def started(way: str, options: argparse.Namespace) -> dict[str, Any]:
    """Run one way in a process of its own; the facts of it."""
    on_cpu = options.device == "cpu"
    limited = way in ("files", "backprop") or (way == "host" and not on_cpu)
    folder = options.folder / f"offload-{os.getpid()}"
    number = options.steps if limited else options.few
    with group(options.limit) if on_cpu else nullcontext((None, dict)) as (path, seen):
        command = [
            sys.executable,
            __file__,
            str(options.text),
            "--way",
            way,
            "--folder",
            str(folder),
            "--steps",
            str(number),
        ]
        for name in ("width", "depth", "heads", "blocks", "context", "batch_size", "threads", "device"):
            command += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
        command += ["--limit", str(options.limit if limited else 0)]
        command += ["--group", str(path)] if path and limited else []
        try:
            ended = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=os.environ | ALLOCATION)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        facts = {
            "way": way,
            "limit_mib": options.limit if limited else None,
            "limited_by": None,
            "exit": ended.returncode,
        }
        if limited:
            own = "a control group" if path else "RLIMIT_DATA"
            facts["limited_by"] = own if on_cpu else "the allocator of the device"
            facts |= seen()
    return facts | (json.loads(ended.stdout) if ended.returncode == 0 else {})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path, help="a file of text")
    parser.add_argument("--ways", default="files,backprop,files-free,host,memory", help="which to run, in order")
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--depth", type=int, default=28)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--blocks", type=int, default=28)
    parser.add_argument("--context", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--steps", type=int, default=24, help="under the limit")
    parser.add_argument("--few", type=int, default=3, help="steps without it")
    parser.add_argument("--limit", type=int, default=400, help="MiB beyond the interpreter, or of the device")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu", help="where a block is at work")
    parser.add_argument("--folder", type=Path, default=Path("runs"), help="where the blocks live meanwhile")
    parser.add_argument("--out", type=Path, help="a file of JSON lines to append to")
    parser.add_argument("--way", help=argparse.SUPPRESS)
    parser.add_argument("--group", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.way:
        run(options.way, options)
        return
    for way in options.ways.split(","):
        line = json.dumps(started(way, options))
        print(line, flush=True)
        if options.out:
            with options.out.open("a") as file:
                file.write(line + "\n")


if __name__ == "__main__":
    main()
