"""Run functions in several processes that form a gloo group on the loopback interface, one thread each."""

from __future__ import annotations

import io
import os
import traceback
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

CONTEXT = get_context("forkserver")  # imports torch once, and forks before any thread or group is there
PRELOAD = [
    "pytest",
    "torch",
    "torch._dynamo",
    "torch.testing",
    "blocklocal.pipeline",
]  # an optimizer imports torch._dynamo
CONTEXT.set_forkserver_preload(PRELOAD)
PATIENCE = 100  # seconds


def run(function: Callable[..., Any], *, processes: int, folder: Path, arguments: tuple = ()) -> list[Any]:
    """function(rank, *arguments) in each of the processes; what they return, which torch.save must take."""
    folder = folder / f"{function.__name__}{len(list(folder.iterdir()))}"
    folder.mkdir()
    children = [
        CONTEXT.Process(target=_child, args=(function, rank, processes, folder, arguments)) for rank in range(processes)
    ]
    for child in children:
        child.start()
    for child in children:
        child.join(PATIENCE)
        if child.is_alive():
            child.kill()
    errors = [path.read_text() for path in sorted(folder.glob("*.error"))]
    assert not errors, "\n".join(errors)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(processes)]


def _child(function: Callable[..., Any], rank: int, processes: int, folder: Path, arguments: tuple) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    try:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=processes)
        torch.save(function(rank, *arguments), folder / f"{rank}.pt")
        dist.destroy_process_group()
    except Exception:
        (folder / f"{rank}.error").write_text(traceback.format_exc())


class Pool:
    """Processes that stay, for many short functions. One that raises ends them all; the next call starts new ones."""

    def __init__(self, *, processes: int, folder: Path) -> None:
        self.processes, self.folder = processes, folder
        self.children: list[Any] = []
        self.pipes: list[Any] = []
        self.starts = 0

    def run(self, function: Callable[..., Any], *, ranks: int, arguments: tuple = ()) -> list[Any]:
        """function(rank, mesh, *arguments) in the first `ranks` processes; mesh has them as its dimension "block"."""
        if not self.children:
            self._start()
        for pipe in self.pipes[:ranks]:
            pipe.send((function, ranks, arguments))
        answers: list[Any] = [pipe.recv() if pipe.poll(PATIENCE) else "no answer" for pipe in self.pipes[:ranks]]
        errors = [answer for answer in answers if isinstance(answer, str)]
        if errors:
            self.stop()
        assert not errors, "\n".join(errors)
        return [torch.load(io.BytesIO(answer), weights_only=True) for answer in answers]

    def stop(self) -> None:
        for child in self.children:
            child.kill()
            child.join()
        self.children, self.pipes = [], []

    def _start(self) -> None:
        store = self.folder / f"store{self.starts}"
        self.starts += 1
        for rank in range(self.processes):
            here, there = CONTEXT.Pipe()
            child = CONTEXT.Process(target=_serve, args=(there, rank, self.processes, store), daemon=True)
            child.start()
            self.children.append(child)
            self.pipes.append(here)


def _serve(pipe: Any, rank: int, processes: int, store: Path) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=processes)
    meshes = {
        ranks: DeviceMesh("cpu", torch.arange(ranks), mesh_dim_names=("block",)) for ranks in range(1, processes + 1)
    }
    while True:
        function, ranks, arguments = pipe.recv()
        try:
            buffer = io.BytesIO()
            torch.save(function(rank, meshes[ranks], *arguments), buffer)
            pipe.send(buffer.getvalue())
        except Exception:
            pipe.send(traceback.format_exc())
