"""Where to put K - 1 borders: the costs of a chain's segments on one batch, and their exact partition."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks


@dataclass(frozen=True)
class Profile:
    """Forward and backward of a chain's segments on one batch.

    seconds: of each segment, forward and backward, the best of the repetitions. storages: for each segment the memory
    that autograd keeps for its backward pass, as bytes by storage; parameters, buffers and the batch itself are not
    counted.
    """

    seconds: tuple[float, ...]
    storages: tuple[dict[int, int], ...]

    def time(self, first: int, last: int) -> float:
        """Seconds of the block made of segments first..last (inclusive)."""
        return sum(self.seconds[first : last + 1])

    def memory(self, first: int, last: int) -> int:
        """Bytes of activations of the block made of segments first..last (inclusive); shared storages count once."""
        union: dict[int, int] = {}
        for storages in self.storages[first : last + 1]:
            union |= storages
        return sum(union.values())


def measure(segments: Sequence[nn.Module], example: Tensor, *, repetitions: int = 3) -> Profile:
    """Profile a chain on `example`, on copies: parameters, statistics and random state stay as they are."""
    segments = copy.deepcopy(list(segments))
    devices = [example.device] if example.is_cuda else []
    with torch.random.fork_rng(devices=devices):
        storages = _storages(segments, example)
        seconds = [_seconds(segments, example) for _ in range(repetitions)]
    return Profile(tuple(min(times) for times in zip(*seconds, strict=True)), storages)


def _storages(segments: list[nn.Module], h: Tensor) -> tuple[dict[int, int], ...]:
    states = (tensor for segment in segments for tensor in (*segment.parameters(), *segment.buffers()))
    ignored = {tensor.untyped_storage().data_ptr() for tensor in states}
    ignored.add(h.untyped_storage().data_ptr())
    kept: list[Tensor] = []  # while these live, no address is used twice
    found: list[dict[int, int]] = []
    for segment in segments:
        storages: dict[int, int] = {}

        def pack(tensor: Tensor, storages: dict[int, int] = storages) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in ignored:
                storages[storage.data_ptr()] = storage.nbytes()
                kept.append(tensor)
            return tensor

        with saved_tensors_hooks(pack, lambda tensor: tensor):
            h = segment(h)
        found.append(storages)
    return tuple(found)


def _seconds(segments: list[nn.Module], h: Tensor) -> list[float]:
    seconds = []
    for segment in segments:
        h = h.detach()
        h.requires_grad_(h.is_floating_point())
        _synchronize(h)
        start = time.perf_counter()
        output = segment(h)
        if output.requires_grad:
            torch.autograd.backward(output, torch.ones_like(output))
        _synchronize(output)
        seconds.append(time.perf_counter() - start)
        h = output
    return seconds


def _synchronize(tensor: Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)


def partition(cost: Callable[[int, int], float], *, segments: int, blocks: int) -> list[int]:
    """The first segments of all blocks but block 0, such that the dearest block is as cheap as can be.

    cost(first, last) is that of a block made of segments first..last and does not fall when the block grows. Among
    the optima one with a small sum of squares is taken, so that the other blocks are even too. Exact, by dynamic
    programming.
    """
    costs = [[cost(i, j) if i <= j else 0.0 for j in range(segments)] for i in range(segments)]
    best = [(costs[0][j], costs[0][j] ** 2) for j in range(segments)]
    choices: list[list[int]] = []
    for block in range(1, blocks):
        ranked = [
            min(((max(best[i - 1][0], costs[i][j]), best[i - 1][1] + costs[i][j] ** 2), i) for i in range(block, j + 1))
            if j >= block
            else ((float("inf"), float("inf")), 0)
            for j in range(segments)
        ]
        best = [value for value, _ in ranked]
        choices.append([start for _, start in ranked])
    starts, end = [], segments - 1
    for choice in reversed(choices):
        starts.append(choice[end])
        end = choice[end] - 1
    return starts[::-1]
