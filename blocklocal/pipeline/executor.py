"""Runs the action lists of `schedule`; messages go by isend and irecv of torch.distributed, through a ring of buffers.

A receive is posted `prefetch` minibatches early, into the slot of the ring that an earlier minibatch has left: the
schedule posts it after the last action that reads the slot, and no stage hands on anything that shares storage with its
input. A window begins with a description of what the rank before reads in it: the number of rows and digests of the
targets and of the side inputs of each minibatch, so that ranks that read different data get an error, and the step
counts of its heads that look through copies, see `copies`. Its first message is preceded by the forms of its tensors,
so that a block gets exactly the tensors that the block before it returned.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from blocklocal.pipeline.copies import Copies
from blocklocal.pipeline.schedule import Action
from blocklocal.pipeline.stage import Message, Stage
from blocklocal.pipeline.wire import Form, TensorSpec, started, wait
from blocklocal.values import Inputs


@dataclass(frozen=True)
class Minibatch:
    """What the stages of one rank read of a minibatch.

    number: the number of minibatches before it. x: for block 0, and for blocks with side inputs. digests: of the
    targets and, if a block of the learner has them, of the side inputs, see `digest`.
    """

    number: int
    x: Inputs | None
    y: Tensor
    digests: tuple[int, ...]


class Executor:
    """Runs the stages of one rank by action lists.

    receives, sends: the tensors of a message, for each stage whose input comes from another rank and each whose output
    goes to one. copies: by border, those between this rank and another. rank: of this process in `group`, where the
    ranks before and after it are its neighbours. timeout: seconds after which a message that has not arrived, or has
    not been taken, is an error; on a GPU the timeout of the process group applies, since the device waits for NCCL.
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        *,
        receives: Mapping[int, Sequence[TensorSpec]],
        sends: Mapping[int, Sequence[TensorSpec]],
        copies: Mapping[int, Copies],
        rank: int,
        group: dist.ProcessGroup | None,
        device: torch.device,
        window: int,
        prefetch: int,
        timeout: float,
    ) -> None:
        self.stages = {stage.k: stage for stage in stages}
        self.receives, self.sends, self.copies = receives, sends, copies
        self.rank, self.group, self.device = rank, group, device
        self.window, self.timeout = window, timedelta(seconds=timeout)
        self.ring: list[list[Tensor] | None] = [None] * prefetch
        self.arriving: dict[int, tuple[list[Tensor], list[dist.Work]]] = {}
        self.leaving: list[tuple[Action, dist.Work, Tensor]] = []
        self.coming: dict[int, tuple[Tensor, dist.Work]] = {}  # copies
        self.handed: dict[int, Message] = {}
        self.forms: dict[int, list[Form]] = {}  # by border

    def begin(self, minibatches: Sequence[Minibatch]) -> dict[int, list[int]]:
        """Begin a window; return, for each border with copies, the minibatches that a refresh precedes.

        ValueError: the rank before reads other minibatches.
        """
        self._compare(minibatches)
        for copies in self.copies.values():
            copies.plan(len(minibatches))
        return {k: list(copies.due) for k, copies in self.copies.items()}

    def run(self, actions: Sequence[Action], minibatches: Sequence[Minibatch]) -> list[Tensor]:
        """Run the window that has begun; return what the stages' `finish` returned, in the order of the actions.

        When it returns, the other ranks have taken all messages. An error names rank, block and minibatch; the pipeline
        cannot be used after it, since its neighbours are waiting for messages that will not come.
        """
        self.handed, results = {}, []
        for action in actions:
            minibatch = minibatches[action.minibatch]
            with self._named(action, minibatch):
                match action.kind:
                    case "RECV_F":
                        self._receive(action, minibatches)
                    case "F":
                        self._forward(action, minibatches)
                    case "SEND_F":
                        self._send(action)
                    case "SEND_C":
                        self._send_copy(action, minibatch)
                    case "RECV_C":
                        self._receive_copy(action)
                    case "B":
                        results.append(self.stages[action.block].finish())
        while self.leaving:
            action, work, _ = self.leaving.pop(0)
            other, what = (self.rank - 1, "copy") if action.kind == "SEND_C" else (self.rank + 1, "message")
            with self._named(action, minibatches[action.minibatch]):
                self._wait(work, f"rank {other} did not take the {what}")
        return results

    def _compare(self, minibatches: Sequence[Minibatch]) -> None:
        own = [number for minibatch in minibatches for number in (len(minibatch.y), *minibatch.digests)]
        width = 1 + len(minibatches[0].digests)
        own += [0] * (width * self.window - len(own))
        for k in self.sends:
            steps = self.copies[k].steps if k in self.copies else []
            contents = torch.tensor(own + steps, device=self.device)
            work = started(dist.isend(contents, group=self.group, group_dst=self.rank + 1))
            self.leaving.append((Action(k, "SEND_F", 0), work, contents))
        for k in self.receives:
            with self._named(Action(k, "RECV_F", 0), minibatches[0]):
                copies = self.copies.get(k - 1)
                size = len(own) + (len(copies.heads) if copies else 0)
                contents = torch.empty(size, dtype=torch.int64, device=self.device)
                work = started(dist.irecv(contents, group=self.group, group_src=self.rank - 1))
                self._wait(work, f"no message from rank {self.rank - 1}")
                found = contents.tolist()
                if _differ(found[: len(own)], own, width=width):
                    raise ValueError(
                        f"rank {self.rank - 1} reads other targets or side inputs: all ranks must go through the same "
                        "minibatches in the same order, drawn from the same seed"
                    )
                if copies:
                    copies.follow(found[len(own) :])

    def _receive(self, action: Action, minibatches: Sequence[Minibatch]) -> None:
        specs, rows = self.receives[action.block], len(minibatches[action.minibatch].y)
        parts = self._buffers(action.minibatch % len(self.ring), rows=rows, specs=specs)
        if action.minibatch == 0:
            size = sum(2 + len(spec.shape) for spec in specs)
            parts = [torch.empty(size, dtype=torch.int64, device=self.device), *parts]
        works = [started(dist.irecv(part, group=self.group, group_src=self.rank - 1)) for part in parts]
        self.arriving[action.minibatch] = parts, works

    def _forward(self, action: Action, minibatches: Sequence[Minibatch]) -> None:
        k, minibatch = action.block, minibatches[action.minibatch]
        if action.minibatch in self.coming and k in self.sends:
            message, work = self.coming.pop(action.minibatch)
            self._wait(work, f"no copy from rank {self.rank + 1}")
            self.copies[k].deliver(action.minibatch, message)
        if k in self.receives:
            message = self._arrived(action, minibatches)
        elif k > 0:
            message = self.handed.pop(k - 1)
        else:
            message = ()
        self.handed[k] = self.stages[k](message, x=minibatch.x, y=minibatch.y, minibatch=minibatch.number)

    def _arrived(self, action: Action, minibatches: Sequence[Minibatch]) -> Message:
        specs, rows = self.receives[action.block], len(minibatches[action.minibatch].y)
        parts, works = self.arriving.pop(action.minibatch)
        for work in works:
            self._wait(work, f"no message from rank {self.rank - 1}")
        if action.minibatch == 0:
            preamble, *parts = parts
            self.forms[action.block - 1] = _read(preamble.tolist(), specs)
        forms = self.forms[action.block - 1]
        return tuple(
            form.tensor(part, shape=(rows, *spec.shape)) for part, spec, form in zip(parts, specs, forms, strict=True)
        )

    def _send(self, action: Action) -> None:
        message, specs, parts = self.handed.pop(action.block), self.sends[action.block], []
        if action.minibatch == 0:
            forms = self.forms[action.block] = [Form.of(h) for h in message]
            numbers = [number for form in forms for number in form.numbers()]
            parts.append(torch.tensor(numbers, device=self.device))
        for h, spec, form in zip(message, specs, self.forms[action.block], strict=True):
            if not form.fits(h):
                raise ValueError(f"the block returns a tensor of the form {Form.of(h)}, but returned {form} before")
            parts.append(form.elements(h, dtype=spec.dtype))
        self.stages[action.block].sent = sum(part.nbytes for part in parts)
        for part in parts:
            work = started(dist.isend(part, group=self.group, group_dst=self.rank + 1))
            self.leaving.append((action, work, part))  # must stay alive until it is taken

    def _wait(self, work: dist.Work, failure: str) -> None:
        wait(work, failure=failure, timeout=self.timeout, device=self.device)

    def _send_copy(self, action: Action, minibatch: Minibatch) -> None:
        stage = self.stages[action.block]
        stage.record("wait", minibatch=minibatch.number)
        message = self.copies[action.block - 1].message(action.minibatch)
        work = started(dist.isend(message, group=self.group, group_dst=self.rank - 1))
        self.leaving.append((action, work, message))
        stage.record("copy", minibatch=minibatch.number, size=message.nbytes)

    def _receive_copy(self, action: Action) -> None:
        message = self.copies[action.block].buffer(action.minibatch)
        work = started(dist.irecv(message, group=self.group, group_src=self.rank + 1))
        self.coming[action.minibatch] = message, work

    def _buffers(self, slot: int, *, rows: int, specs: Sequence[TensorSpec]) -> list[Tensor]:
        sizes = [rows * math.prod(spec.shape) for spec in specs]
        buffers = self.ring[slot]
        if buffers is None or any(len(buffer) < size for buffer, size in zip(buffers, sizes, strict=True)):
            buffers = self.ring[slot] = [
                torch.empty(size, dtype=spec.dtype, device=self.device) for spec, size in zip(specs, sizes, strict=True)
            ]
        return [buffer[:size] for buffer, size in zip(buffers, sizes, strict=True)]

    @contextmanager
    def _named(self, action: Action, minibatch: Minibatch) -> Iterator[None]:
        """Make errors say where they happened; a ValueError, a user's mistake, stays one."""
        try:
            yield
        except Exception as error:
            kind = ValueError if isinstance(error, ValueError) else RuntimeError
            name = "" if isinstance(error, ValueError | RuntimeError) else f"{type(error).__name__}: "
            raise kind(
                f"rank {self.rank}, block {action.block}, minibatch {minibatch.number}: {name}{error}"
            ) from error


def _differ(theirs: list[int], ours: list[int], *, width: int) -> bool:
    """Whether two ranks read different minibatches, by their rows and digests; a digest of zero is unknown."""
    pairs = enumerate(zip(theirs, ours, strict=True))
    return any(a != b and (i % width == 0 or 0 not in (a, b)) for i, (a, b) in pairs)


def _read(preamble: list[int], specs: Sequence[TensorSpec]) -> list[Form]:
    """The forms of a message's tensors."""
    forms = []
    for spec in specs:
        size = 2 + len(spec.shape)
        forms.append(Form.read(preamble[:size]))
        preamble = preamble[size:]
    return forms
