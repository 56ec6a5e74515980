"""Files in the safetensors format: a length, a JSON header, then the bytes of all tensors, one after another.

Tensors are read straight into their own memory, without a mapping of the file in between, which would count as resident
beside them. The format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import ctypes
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.complex64: "C64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
LARGEST = 2**27
"""Bytes of a header, of a million tensors."""


def write(path: Path, outlines: Mapping[str, Tensor], tensors: Iterable[Tensor]) -> None:
    """Write a file of these names; its tensors may come one at a time. OSError: there is no room, known at once.

    ValueError: a dtype that the format lacks. Tensors of larger elements should come first, for their alignment.
    """
    header, end = _header(outlines)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, 8 + len(text) + end)
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            host = tensor.detach().contiguous().cpu()
            file.write(_memory(host))


def read(path: Path, outlines: Mapping[str, Tensor], *, device: torch.device) -> dict[str, Tensor]:
    """New tensors on `device` with the values of these names. ValueError: the file is not what was written."""
    with _opened(path) as file:
        header, begin = _checked(file, path)
        fresh = {}
        for name, outline in outlines.items():
            found = header.get(name)
            if found is None or (found["dtype"], found["shape"]) != (NAMES.get(outline.dtype), list(outline.shape)):
                raise damaged(path, f"no tensor {name!r} of shape {tuple(outline.shape)} and {outline.dtype}")
            file.seek(begin + found["data_offsets"][0])
            fresh[name] = _read(file, outline, device=device)
        return fresh


def check(path: Path) -> None:
    """ValueError: the file is missing, truncated, or no safetensors file."""
    with _opened(path) as file:
        _checked(file, path)


def damaged(path: Path, what: str) -> ValueError:
    return ValueError(f"{str(path)!r} is not what was written there ({what}): put the folder back, or begin in another")


def _header(outlines: Mapping[str, Tensor]) -> tuple[dict[str, Any], int]:
    header, end = {}, 0
    for name, outline in outlines.items():
        if outline.dtype not in NAMES:
            raise ValueError(f"{name!r} is of {outline.dtype}, which a safetensors file cannot hold")
        begin, end = end, end + outline.nbytes
        header[name] = {"dtype": NAMES[outline.dtype], "shape": list(outline.shape), "data_offsets": [begin, end]}
    return header, end


def _opened(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except FileNotFoundError:
        raise damaged(path, "it is missing") from None


def _checked(file: BinaryIO, path: Path) -> tuple[dict[str, Any], int]:
    """The header, and where the tensors begin."""
    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > min(LARGEST, size - 8):
        raise damaged(path, "no safetensors file, or truncated")
    try:
        header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        end = max((found["data_offsets"][1] for found in header.values()), default=0)
        whole = size == 8 + length + end and all(
            isinstance(found["dtype"], str) and 0 <= found["data_offsets"][0] <= found["data_offsets"][1]
            for found in header.values()
        )
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
        raise damaged(path, "no safetensors file") from None
    if not whole:
        raise damaged(path, f"{size:,} bytes where its header says {8 + length + end:,}")
    return header, 8 + length


def _read(file: BinaryIO, outline: Tensor, *, device: torch.device) -> Tensor:
    tensor = torch.empty_like(outline, device=device)
    host = tensor if tensor.is_cpu and tensor.is_contiguous() else torch.empty(outline.shape, dtype=outline.dtype)
    read = file.readinto(_memory(host))  # pyright: ignore[reportAttributeAccessIssue] (a buffered reader)
    assert read == host.nbytes
    if host is not tensor:
        tensor.copy_(host)
    return tensor


def _memory(tensor: Tensor) -> ctypes.Array:
    """The bytes of a contiguous tensor on the CPU, to read from and write into."""
    return (ctypes.c_ubyte * tensor.nbytes).from_address(tensor.data_ptr())
