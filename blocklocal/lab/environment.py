"""The device and versions that a run uses, and how its process manages memory."""

from __future__ import annotations

import ctypes
import mmap
import platform
import re
import resource
import socket
import subprocess
import sys
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from blocklocal.lab.errors import UserError


def find_device(name: str) -> torch.device:
    """The device of that name; `auto` is a GPU if there is one. UserError: no such device."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        with warnings.catch_warnings(action="ignore"):  # of names that torch used to know
            device = torch.device(name)
        if device.type == "cpu" and device.index:
            raise RuntimeError("there is one cpu, without a number")
        torch.ones(2, device=device).sum().item()
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = re.split(r"\n|\. ", str(error))[0]
        raise UserError(f"--device {name!r} cannot be used here ({reason}); choose auto or cpu") from error
    return device


def find_interface(name: str) -> str:
    """Check a network interface of this machine. UserError: there is none of that name."""
    there = [found for _, found in socket.if_nameindex()]
    if name not in there:
        raise UserError(f"--interface {name!r} does not exist: this machine has {', '.join(there)}")
    return name


def describe(device: torch.device) -> dict[str, Any]:
    """Versions, device and git commit, as plain values."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {
        "versions": {
            "blocklocal": version("blocklocal"),
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "device": {"type": device.type, "name": name, "threads": torch.get_num_threads()},
        "git": _commit(),
    }


def peak_memory(device: torch.device) -> float:
    """Peak memory in MiB: of tensors on a GPU, otherwise of the whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def keep_freed_memory(*, largest: int = 2**25) -> None:
    """Let this process keep the memory that it frees for the next step, in blocks of up to this number of bytes.

    By default, glibc returns blocks of some MiB to the system when it sees fit and gets them back page by page. Whether
    it does depends on the sizes allocated before, so the same step can take twice as long in one process as in another.
    The memory kept is fragmented: with the largest blocks in it, it is up to twice what is used. With another C library
    this does nothing.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(-3, largest)  # M_MMAP_THRESHOLD: a block of this size is given back when it is freed
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: never give back the end of the heap


def give_back_freed_memory() -> None:
    """Give memory that this process has freed back to the system, pages between used ones too; only with glibc."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def give_back_pages(address: int, size: int) -> None:
    """Give memory mapped from a file and shared back to the system, which keeps its content; only on Linux."""
    if sys.platform == "linux":
        ctypes.CDLL(None).madvise(ctypes.c_void_p(address), ctypes.c_size_t(size), mmap.MADV_DONTNEED)


def _commit() -> str | None:
    """The commit of this code, with "-dirty" if files differ from it; None outside a repository."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
