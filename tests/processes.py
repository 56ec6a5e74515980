"""Run a function in several processes that form a gloo group on the loopback interface, one thread each."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

CONTEXT = get_context("forkserver")  # imports torch once, and forks before any thread or group is there
CONTEXT.set_forkserver_preload(["torch", "blocklocal.pipeline"])
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
