"""Shapes of tensors as they are saved, to tell whether a state fits a model."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

Shape = tuple[torch.dtype, tuple[int, ...], tuple[int, ...]]
"""dtype, sizes and strides."""


def shapes(outlines: Mapping[str, Tensor]) -> dict[str, Shape]:
    return {name: (outline.dtype, tuple(outline.shape), outline.stride()) for name, outline in outlines.items()}


def outline(shape: Shape) -> Tensor:
    dtype, size, stride = shape
    return torch.empty_strided(size, stride, dtype=dtype, device="meta")


def require_same(saved: Mapping[str, Shape], own: Mapping[str, Shape]) -> None:
    """ValueError: the tensors that were saved are not those of this model."""
    for name in {**saved, **own}:
        if saved.get(name, ())[:2] != own.get(name, ())[:2]:
            raise ValueError(
                f"the saved state is of another model: {name!r} was {_called(saved.get(name))} and is "
                f"{_called(own.get(name))}: build the same learner"
            )


def _called(shape: Shape | None) -> str:
    return "missing" if shape is None else f"{shape[0]} of shape {shape[1]}"
