"""Runs the action lists of `schedule`: messages go by isend and irecv of torch.distributed, through a ring of buffers.

A receive is posted `prefetch` minibatches early, into the slot of the ring that the minibatch before it has left: the
schedule posts it after the last action that reads the slot, and no stage hands on what shares storage with its input.
The first message of a window is preceded by the dtypes that its tensors have for the blocks, which autocast decides,
so that a block gets the very tensor that the block before it gave.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from blocklocal.pipeline.schedule import Action
from blocklocal.pipeline.stage import Message, Stage

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of a message: (rows, *shape), under way as `dtype`, for a minibatch with that number of rows."""

    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Minibatch:
    """What the stages of one rank read of a minibatch. number: how many came before it. x: for block 0 alone."""

    number: int
    x: Tensor | None
    y: Tensor


class Executor:
    """The stages of one rank, run by action lists.

    receives, sends: the tensors of a message to each stage whose input comes from another rank, and from each whose
    output goes to one. rank: of this process in `group`, where the ranks before and after it are its neighbours.
    timeout: seconds after which a message that has not arrived, or was not taken, is an error; on a GPU the timeout of
    the process group counts, since waiting for NCCL is the device's business.
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        *,
        receives: Mapping[int, Sequence[TensorSpec]],
        sends: Mapping[int, Sequence[TensorSpec]],
        rank: int,
        group: dist.ProcessGroup | None,
        device: torch.device,
        prefetch: int,
        timeout: float,
    ) -> None:
        self.stages = {stage.k: stage for stage in stages}
        self.receives, self.sends = receives, sends
        self.rank, self.group, self.device = rank, group, device
        self.timeout = timedelta(seconds=timeout)
        self.ring: list[list[Tensor] | None] = [None] * prefetch
        self.arriving: dict[int, tuple[Message, list[dist.Work]]] = {}
        self.leaving: list[tuple[Action, dist.Work, Tensor]] = []
        self.handed: dict[int, Message] = {}
        self.dtypes: dict[int, list[torch.dtype]] = {}

    def run(self, actions: Sequence[Action], minibatches: Sequence[Minibatch]) -> list[Tensor]:
        """One window of minibatches; what the stages' `finish` returned, in the order of the actions.

        All messages have been taken by the next rank when it returns. An error names rank, block and minibatch; the
        pipeline cannot be used after it, since its neighbours are waiting for messages that will not come.
        """
        self.handed, results = {}, []
        for action in actions:
            minibatch = minibatches[action.minibatch]
            with self._named(action, minibatch):
                match action.kind:
                    case "RECV_F":
                        self._receive(action, rows=len(minibatch.y))
                    case "F":
                        self._forward(action, minibatch)
                    case "SEND_F":
                        self._send(action)
                    case "B":
                        results.append(self.stages[action.block].finish())
        while self.leaving:
            action, work, _ = self.leaving.pop(0)
            with self._named(action, minibatches[action.minibatch]):
                self._wait(work, f"rank {self.rank + 1} did not take the message")
        return results

    def _receive(self, action: Action, *, rows: int) -> None:
        specs = self.receives[action.block]
        message = self._buffers(action.minibatch % len(self.ring), rows=rows, specs=specs)
        if action.minibatch == 0:
            message = (torch.empty(len(specs), dtype=torch.int64, device=self.device), *message)
        works = [_started(dist.irecv(h, group=self.group, group_src=self.rank - 1)) for h in message]
        self.arriving[action.minibatch] = message, works

    def _forward(self, action: Action, minibatch: Minibatch) -> None:
        k = action.block
        if k in self.receives:
            message = self._arrived(action)
        elif k == 0:
            assert minibatch.x is not None
            message = (minibatch.x,)
        else:
            message = self.handed.pop(k - 1)
        self.handed[k] = self.stages[k](message, y=minibatch.y, minibatch=minibatch.number)

    def _arrived(self, action: Action) -> Message:
        message, works = self.arriving.pop(action.minibatch)
        for work in works:
            self._wait(work, f"no message from rank {self.rank - 1}")
        if action.minibatch == 0:
            self.dtypes[action.block] = [DTYPES[i] for i in message[0].tolist()]
            message = message[1:]
        return tuple(h.to(dtype) for h, dtype in zip(message, self.dtypes[action.block], strict=True))

    def _send(self, action: Action) -> None:
        message = self.handed.pop(action.block)
        dtypes, specs = [h.dtype for h in message], self.sends[action.block]
        parts = [h.to(spec.dtype).contiguous() for h, spec in zip(message, specs, strict=True)]
        if action.minibatch == 0:
            self.dtypes[action.block] = dtypes
            parts = [torch.tensor([DTYPES.index(dtype) for dtype in dtypes], device=self.device), *parts]
        elif dtypes != self.dtypes[action.block]:
            raise ValueError(f"the block gives {dtypes} and gave {self.dtypes[action.block]} in the same window")
        for h in parts:
            work = _started(dist.isend(h, group=self.group, group_dst=self.rank + 1))
            self.leaving.append((action, work, h))  # which must live until it was taken

    def _wait(self, work: dist.Work, failure: str) -> None:
        try:
            if self.device.type == "cpu":
                work.wait(self.timeout)
            else:
                work.wait()
        except RuntimeError as error:
            seconds = self.timeout.total_seconds()
            raise RuntimeError(f"{failure} within {seconds:g} s ({_first_line(error)})") from error

    def _buffers(self, slot: int, *, rows: int, specs: Sequence[TensorSpec]) -> Message:
        buffers = self.ring[slot]
        if buffers is None or len(buffers[0]) < rows:
            buffers = [torch.empty(rows, *spec.shape, dtype=spec.dtype, device=self.device) for spec in specs]
            self.ring[slot] = buffers
        return tuple(buffer[:rows] for buffer in buffers)

    @contextmanager
    def _named(self, action: Action, minibatch: Minibatch) -> Iterator[None]:
        """Errors inside say where they happened; a ValueError, somebody's mistake, stays one."""
        try:
            yield
        except Exception as error:
            kind = ValueError if isinstance(error, ValueError) else RuntimeError
            name = "" if isinstance(error, ValueError | RuntimeError) else f"{type(error).__name__}: "
            raise kind(
                f"rank {self.rank}, block {action.block}, minibatch {minibatch.number}: {name}{error}"
            ) from error


def _started(work: dist.Work | None) -> dist.Work:
    assert work is not None  # None is for processes outside the group
    return work


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
