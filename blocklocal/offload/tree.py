"""Nested values as JSON, with their tensors apart, for what is saved beside the blocks. Reading them runs no code."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import torch
from torch import Tensor

from blocklocal.offload.tensor_file import NAMES

DTYPES = {name: dtype for dtype, name in NAMES.items()}
PLAIN = (type(None), bool, int, str)


def encode(value: Any, tensors: dict[str, Tensor]) -> Any:
    """What `json.dumps` takes; the tensors are added to `tensors`. ValueError: a value of another kind."""
    if type(value) in PLAIN:
        return value
    if type(value) is float:
        return value if math.isfinite(value) else {"float": str(value)}
    if type(value) is list:
        return [encode(part, tensors) for part in value]
    if isinstance(value, tuple):
        return {"tuple": [encode(part, tensors) for part in value]}
    if type(value) in (dict, Counter):
        pairs = [[encode(key, tensors), encode(part, tensors)] for key, part in value.items()]
        return {"dict" if type(value) is dict else "counter": pairs}
    if isinstance(value, torch.dtype) and value in NAMES:
        return {"dtype": NAMES[value]}
    if isinstance(value, Tensor) and value.dtype in NAMES and value.layout is torch.strided:
        name = str(len(tensors))
        tensors[name] = value.detach()
        return {"tensor": [name, NAMES[value.dtype], list(value.shape)]}
    raise ValueError(
        f"a {type(value).__name__} cannot be saved: progress= must be made of tensors, numbers, strings, lists and "
        "dictionaries"
    )


def outlines(encoded: Any) -> dict[str, Tensor]:
    """The tensors that an encoded value refers to, on the meta device."""
    if isinstance(encoded, list):
        return {name: outline for part in encoded for name, outline in outlines(part).items()}
    if not isinstance(encoded, dict):
        return {}
    ((kind, content),) = encoded.items()
    if kind != "tensor":
        return outlines(content)
    name, dtype, shape = content
    return {name: torch.empty(shape, dtype=DTYPES[dtype], device="meta")}


def decode(encoded: Any, tensors: dict[str, Tensor]) -> Any:
    """The value that was encoded."""
    if isinstance(encoded, list):
        return [decode(part, tensors) for part in encoded]
    if not isinstance(encoded, dict):
        return encoded
    ((kind, content),) = encoded.items()
    if kind == "float":
        return float(content)
    if kind == "dtype":
        return DTYPES[content]
    if kind == "tensor":
        return tensors[content[0]]
    parts = decode(content, tensors)
    if kind == "tuple":
        return tuple(parts)
    return dict(parts) if kind == "dict" else Counter(dict(parts))
