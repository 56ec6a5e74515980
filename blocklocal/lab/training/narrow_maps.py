"""Refuses what PyTorch computes wrongly: convolutions in bfloat16 on a CPU whose stride is larger than their map."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from torch import Tensor, nn

from blocklocal.lab.environment import find_device
from blocklocal.lab.errors import UserError
from blocklocal.lab.settings import Settings

Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d


def computed_wrongly(settings: Settings) -> bool:
    """Whether a run trains where such convolutions have wrong gradients."""
    return settings.dtype == "bf16" and find_device(settings.device).type == "cpu"


@contextmanager
def strides_checked(part: nn.Module, *, name: str) -> Iterator[None]:
    """Looks at the convolutions in a part of the model of this name, while it runs.

    UserError: one has a larger stride than its input is wide. In bfloat16 its weight gradient would be memory that was
    never written (torch 2.13.0 with its oneDNN, on processors with AVX512-BF16).
    """
    found: list[tuple[str, int, int]] = []

    def look(layer: str, convolution: Convolution, args: tuple[Tensor, ...]) -> None:
        for h in args:
            stride, width = convolution.stride[-1], h.shape[-1]
            if convolution.kernel_size[-1] > 1 and stride > width:
                found.append((layer, stride, width))

    hooks = [
        module.register_forward_pre_hook(partial(look, layer))
        for layer, module in part.named_modules()
        if isinstance(module, Convolution)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
    for layer, stride, width in found:
        raise UserError(
            f"model {name!r} with --dtype bf16 on a CPU: {layer!r} has a stride of {stride} on a map {width} wide, and "
            "PyTorch returns a wrong gradient of its weight there: choose --dtype fp32, or a model with fewer strides"
        )
