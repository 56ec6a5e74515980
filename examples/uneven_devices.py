"""Uneven devices: `torchrun --standalone --nproc-per-node 2 examples/uneven_devices.py` (Linux, two cores).

Each process has one core, and that of rank 1 has other work to do. Blocks are placed evenly, then as measured.
"""

import os
import subprocess
import sys
import time
from itertools import repeat

import torch
import torch.distributed as dist
from torch import nn

import blocklocal as bll
from blocklocal.pipeline import balanced

# It does not outlive the process that started it.
BUSY = "import os; os.sched_setaffinity(0, {core}); parent = os.getppid()\nwhile os.getppid() == parent: pass"


def learner(x: torch.Tensor) -> bll.BlockLocal:
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU()) for _ in range(9)]
    return bll.BlockLocal([*layers[:-1], nn.Sequential(layers[-1], nn.Linear(512, 10))], classes=10, example=x)


def main(minibatches: int = 160) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    core = sorted(os.sched_getaffinity(0))[rank]
    os.sched_setaffinity(0, {core})
    other = subprocess.Popen([sys.executable, "-c", BUSY.format(core={core})]) if rank == 1 else None
    torch.manual_seed(0)  # the same data on every rank
    x, y = torch.randn(128, 512), torch.randint(10, (128,))
    for name in ("even", "as measured"):
        trained = learner(x)
        placement = balanced(trained, x, y) if name == "as measured" else None
        pipeline = bll.Pipeline(trained, optimizer=lambda p: torch.optim.SGD(p, lr=0.01), placement=placement)
        windows = pipeline.train(repeat((x, y)))
        next(windows)
        start, done = time.perf_counter(), 0
        while done < minibatches:
            done += len(next(windows))
        if rank == 1:
            milliseconds = 1e3 * (time.perf_counter() - start) / done
            print(
                f"{name}: blocks on ranks {pipeline.placement.ranks}, {milliseconds:.1f} ms per minibatch", flush=True
            )
    if other:
        other.kill()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
