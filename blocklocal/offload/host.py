"""Blocks in host memory, for a device with less memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


class HostStore:
    """Keeps blocks in host memory. For a CUDA device it is pinned, and copies run beside the computation.

    The device then holds two blocks at a time: the one at work, and the next one as it arrives. For the CPU, where
    blocks are in host memory already, nothing is copied, and no memory saved. What is kept does not outlive the
    process: `save` and `resume` raise a ValueError.

    >>> from functools import partial
    >>> import blocklocal as bll
    >>> learner = bll.BlockLocal([nn.Linear(8, 16), nn.Linear(16, 3)], classes=3, example=torch.randn(2, 8))
    >>> offloaded = learner.offload(HostStore(), optimizer=partial(torch.optim.AdamW, lr=1e-3))
    >>> x, y = torch.randn(4, 8), torch.tensor([0, 2, 1, 0])
    >>> learner.backward(x, y, optimizers=offloaded.optimizers).shape
    torch.Size([2])
    """

    saved = False

    def __init__(self) -> None:
        self._kept: dict[str, dict[str, Tensor]] = {}
        self._arriving: dict[str, dict[str, Tensor]] = {}
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def put(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        self._arriving.pop(key, None)
        before, kept = self._kept.get(key, {}), {}
        for name, tensor in tensors.items():
            kept[name] = tensor.detach() if tensor.is_cpu else self._to_host(tensor, before.get(name))
        self._kept[key] = kept

    def get(self, key: str, outlines: Mapping[str, Tensor], *, device: torch.device) -> dict[str, Tensor]:
        arriving = self._arriving.pop(key, None)
        fresh = self._begin(key, outlines, device=device) if arriving is None else arriving
        if device.type == "cuda":
            torch.cuda.current_stream(device).wait_stream(self._stream(device))
        return fresh

    def prefetch(self, key: str, outlines: Mapping[str, Tensor], *, device: torch.device) -> None:
        if device.type == "cuda" and key not in self._arriving:
            self._arriving[key] = self._begin(key, outlines, device=device)

    def save(self, state: Any) -> None:
        raise ValueError("host memory does not outlive this process: pass a bll.FileStore to save a run")

    def resume(self) -> Any:
        raise ValueError("host memory keeps nothing of another process: pass a bll.FileStore to resume a run")

    def _begin(self, key: str, outlines: Mapping[str, Tensor], *, device: torch.device) -> dict[str, Tensor]:
        if device.type == "cpu":
            return {name: self._kept[key][name] for name in outlines}
        fresh = {name: torch.empty_like(outline, device=device) for name, outline in outlines.items()}
        for name, tensor in fresh.items():
            self._copy(tensor, self._kept[key][name])
        return fresh

    def _to_host(self, tensor: Tensor, host: Tensor | None) -> Tensor:
        if host is None or not _same_layout(host, tensor) or (tensor.is_cuda and not host.is_pinned()):
            host = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
        self._copy(host, tensor)
        return host

    def _copy(self, target: Tensor, source: Tensor) -> None:
        """Copy; where one of the two is on a CUDA device, on a stream of its own, after what is queued so far."""
        device = target.device if target.is_cuda else source.device
        if device.type != "cuda":
            target.copy_(source)
            return
        stream = self._stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            target.copy_(source, non_blocking=True)
        (target if target.is_cuda else source).record_stream(stream)  # its memory is not given away before

    def _stream(self, device: torch.device) -> torch.cuda.Stream:
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        return self._streams[device]


def _same_layout(one: Tensor, other: Tensor) -> bool:
    return (one.shape, one.dtype, one.stride()) == (other.shape, other.dtype, other.stride())
