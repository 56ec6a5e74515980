"""The workloads of the pipeline benchmark: chains of blocks of equal cost, and emulated devices."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

CLASSES = 10


@dataclass(frozen=True)
class Chain:
    """Blocks with a minibatch (x, y) for them."""

    blocks: list[nn.Module]
    x: Tensor
    y: Tensor


def mlp() -> Chain:
    """Four blocks of three Linear(1024), batches of 128."""
    blocks: list[list[nn.Module]] = [
        [layer for _ in range(3) for layer in (nn.Linear(1024, 1024), nn.ReLU())] for _ in range(4)
    ]
    blocks[-1].append(nn.Linear(1024, CLASSES))
    return _chain(blocks, torch.randn(128, 1024))


def cnn() -> Chain:
    """Four blocks of two convolutions on maps of 64 x 16 x 16, 64 images of 3 x 32 x 32: messages of 4 MiB."""

    def convolution(inputs: int, size: int) -> list[nn.Module]:
        layer = nn.Conv2d(inputs, 64, size, padding=size // 2, bias=False)
        return [layer, nn.BatchNorm2d(64), nn.ReLU()]

    blocks = [[*convolution(64, 3), *convolution(64, 3)] for _ in range(4)]
    blocks[0][:3] = [nn.PixelUnshuffle(2), *convolution(3 * 4, 5)]  # takes as long as the others
    blocks[-1] += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, CLASSES)]
    return _chain(blocks, torch.randn(64, 3, 32, 32))


def devices(stages: int) -> Chain:
    """One block per device, which takes 20 ms forward and 40 ms backward without computing; messages of 1 MiB."""
    blocks: list[list[nn.Module]] = [[Device(rows=64, forward=0.02, backward=0.04)] for _ in range(stages)]
    blocks[-1].append(nn.Linear(4096, CLASSES))
    return _chain(blocks, torch.randn(64, 4096))


CHAINS: dict[str, Callable[[int], Chain]] = {
    "mlp": lambda stages: mlp(),
    "cnn": lambda stages: cnn(),
    "devices": devices,
}


class Device(nn.Module):
    """Sleeps for a given time on a batch of `rows`, or for part of it on part of the batch; scales its input."""

    def __init__(self, *, rows: int, forward: float, backward: float) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.seconds = (forward / rows, backward / rows)

    def forward(self, h: Tensor) -> Tensor:
        return Sleep.apply(h * self.scale, *self.seconds)


class Sleep(torch.autograd.Function):
    """The identity, with a delay per row in each direction."""

    @staticmethod
    def forward(ctx, h: Tensor, forward: float, backward: float) -> Tensor:
        ctx.seconds = backward * len(h)
        time.sleep(forward * len(h))
        return h.view_as(h)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        time.sleep(ctx.seconds)
        return gradient, None, None


def _chain(blocks: list[list[nn.Module]], x: Tensor) -> Chain:
    return Chain([nn.Sequential(*layers) for layers in blocks], x, torch.randint(CLASSES, (len(x),)))
