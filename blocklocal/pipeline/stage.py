"""One block as it is trained: forward pass with the local loss, then local backward pass and optimizer step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from blocklocal.inputs import check_frozen
from blocklocal.learner import BlockLocal, Features
from blocklocal.messages import dense
from blocklocal.pipeline.trace import Phase, Trace
from blocklocal.seeding import seeded
from blocklocal.values import Inputs, tensors

Message = tuple[Tensor, ...]
"""The tensors that cross a border together: the block's output and, with add_beliefs, the belief."""


class LocalStep(nn.Module):
    """Block k of a learner and its border as one module, which can be replicated or sharded as a whole.

    (h, y, x) -> (local loss, output detached); without y -> (prediction of exit k, output). x: the model's inputs, for
    a block that has side inputs.
    """

    def __init__(self, learner: BlockLocal, k: int) -> None:
        super().__init__()
        self.block = learner.blocks[k]
        self.border = learner.borders[k] if k < len(learner.borders) else None
        self._learner, self.k = (learner,), k  # in a tuple: the other blocks are not part of this one

    def forward(self, h: Any, y: Tensor | None, x: Inputs | None) -> tuple[Tensor, Features]:
        (learner,) = self._learner
        if y is not None:
            return learner.local(self.k, h, y, x=x)
        return learner.exit(self.k, h, x=x)


@dataclass(frozen=True)
class MessageType:
    """The dtype of messages on their way; the next block gets them in the dtype that they had before.

    rounds: whether it may be narrower than a block's output. Then every border rounds to it, also one between two
    blocks of the same rank, so that the placement does not change results.
    """

    dtype: torch.dtype
    rounds: bool

    def round(self, h: Tensor) -> Tensor:
        if torch.promote_types(h.dtype, self.dtype) == self.dtype:
            return h
        if not self.rounds:
            raise ValueError(
                f"the block returns {h.dtype}, but messages are {self.dtype}, as parameters are: pass "
                f"message_dtype={h.dtype}"
            )
        return h.to(self.dtype).to(h.dtype)


class Stage(nn.Module):
    """Block k on its device, between its two borders. step: a LocalStep, or a module that replicates or shards one.

    send_shape: the shape of one sample of its output; None for the last block, which predicts. accumulate: number of
    minibatches whose mean gradient makes an optimizer step.

    In training mode `finish` learns from the minibatch of the last forward pass; in evaluation mode it only releases
    it. Random draws, such as those of dropout, depend on `seed`, the minibatch and the block: they are the same
    wherever the block is placed, and whenever the minibatch is repeated.
    """

    def __init__(
        self,
        step: nn.Module,
        k: int,
        *,
        optimizer: Optimizer | None,
        message_type: MessageType,
        send_shape: tuple[int, ...] | None,
        seed: int,
        trace: Trace | None,
        accumulate: int = 1,
    ) -> None:
        super().__init__()
        self.step, self.k, self.send_shape = step, k, send_shape
        self.optimizer, self.message_type, self.accumulate = optimizer, message_type, accumulate
        self.seed, self.trace = seed, trace
        self.minibatch = 0
        self.result: Tensor | None = None
        self.sent = 0
        """Bytes of the last message, if it went to another rank."""

    def forward(self, message: Message, *, x: Inputs | None, y: Tensor, minibatch: int) -> Message:
        """The message to the next block; for the last block, the prediction. message: empty for block 0, which reads x.

        Nothing that this block hands on or keeps shares storage with `message`, whose buffers the next receive fills.
        """
        self.minibatch = minibatch
        self.record("wait")
        h = x if not message else message[0] if len(message) == 1 else message
        with seeded(self.seed, minibatch, self.k, device=y.device):
            result, output = self.step(h, y if self.training else None, x)
        message = message or tuple(tensors(x))
        self.result = _apart(result, message)
        h, *belief = (_apart(part, message) for part in (output if isinstance(output, tuple) else (output,)))
        if self.send_shape is not None:
            if h.shape != (len(y), *self.send_shape):
                raise ValueError(
                    f"the block returns {tuple(h.shape)} for {len(y)} targets, but returned {self.send_shape} per "
                    "sample for the learner's example=: minibatches of a pipeline must have the example's shape"
                )
            h = self.message_type.round(h)
        self.record("forward")
        return (h, *belief)

    def finish(self) -> Tensor:
        """The local loss, after learning from it; in evaluation mode the prediction of exit k."""
        result, self.result = self.result, None
        assert result is not None
        if not self.training:
            return result
        self.record("send", size=self.sent)
        if not result.requires_grad:
            check_frozen(self.step.parameters(), k=self.k)
        else:
            with torch.autocast(result.device.type, enabled=False):
                (result * (1 / self.accumulate)).backward()
        if self.optimizer is not None and (self.minibatch + 1) % self.accumulate == 0:
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        self.record("backward")
        return result.detach()

    def record(self, phase: Phase, *, minibatch: int | None = None, size: int = 0) -> None:
        """Record the time since the last record as this phase. minibatch: by default that of the last forward pass."""
        if self.trace and self.training:
            number = self.minibatch if minibatch is None else minibatch
            self.trace.record(phase, block=self.k, minibatch=number, size=size)


def _apart(tensor: Tensor, message: Message) -> Tensor:
    """The tensor, made dense, and copied if it is a view of a part of the message."""
    tensor = dense(tensor)
    lent = {part.untyped_storage().data_ptr() for part in message}
    return tensor.clone() if tensor.untyped_storage().data_ptr() in lent else tensor
