"""Action lists on the pipeline runtime of torch. Every private name of torch that this package uses is in this file.

The runtime gets no loss function, so it knows of no backward pass: what it receives never requires a gradient, what it
sends is detached, and its backward action is a function registered here.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from blocklocal.pipeline.schedule import Action
from blocklocal.pipeline.stage import Stage

VERSION = tuple(int(number) for number in re.findall(r"\d+", torch.__version__)[:2])
if VERSION != (2, 13):
    raise ImportError(
        "blocklocal.pipeline stands on the inside of torch.distributed.pipelining as it is in torch 2.13, and this is "
        f"torch {torch.__version__}: install torch 2.13, or train on one process"
    )

from torch.distributed.pipelining import PipelineStage  # noqa: E402
from torch.distributed.pipelining.schedules import (  # noqa: E402
    _Action,
    _ComputationType,
    _PipelineContext,
    _PipelineScheduleRuntime,
)
from torch.distributed.pipelining.stage import _RecvInfo  # noqa: E402

logging.getLogger(_PipelineScheduleRuntime.__module__).setLevel(logging.CRITICAL)  # at an error, lists all actions


@dataclass(frozen=True)
class Inlet:
    """What arrives at a block: messages of `dtype`, (rows, *shape) for a minibatch of so many rows."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class Runtime:
    """Runs this rank's stages by action lists, in windows of at most `window` minibatches.

    inlets: of the stages whose input comes from another rank. ahead: how many receives may be under way at once; they
    share as many buffers. finish: called with a stage for the action B.
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        *,
        inlets: Mapping[int, Inlet],
        blocks: int,
        device: torch.device,
        group: dist.ProcessGroup | None,
        window: int,
        ahead: int,
        finish: Callable[[Stage], None],
    ) -> None:
        self._stages = {
            stage.k: _OneWayStage(
                stage, inlet=inlets.get(stage.k), window=window, ahead=ahead, blocks=blocks, device=device, group=group
            )
            for stage in stages
        }
        self._schedule = _PipelineScheduleRuntime(list(self._stages.values()), window)
        self._schedule.register_custom_function(_ComputationType.FULL_BACKWARD, self._finish)
        self._finish_stage = finish
        self._actions: Mapping[int, Sequence[Action]] = {}

    def run(
        self,
        actions: Mapping[int, Sequence[Action]],
        *,
        rows: Sequence[int],
        inputs: Sequence[Tensor | None],
        keywords: Sequence[dict[str, Any]],
    ) -> None:
        """One window of minibatches with so many rows each.

        inputs: for block 0 alone. keywords: what every stage's forward pass gets beside its input.
        """
        if actions is not self._actions:
            self._schedule._n_microbatches = len(rows)
            parsed = {rank: [_Action.from_str(str(action)) for action in done] for rank, done in actions.items()}
            self._schedule._prepare_schedule_with_comms(parsed, format="compute_comms")
            self._actions = actions
        for stage in self._stages.values():
            stage.has_backward, stage.rows = False, rows
            stage.clear_runtime_states()
        try:
            self._schedule._step_microbatches([(x,) for x in inputs], list(keywords), return_outputs=False)
        except RuntimeError as error:  # around what went wrong in a forward pass
            raise error.__cause__ or error from None

    def _finish(self, action: _Action, ctx: _PipelineContext) -> None:
        stage, minibatch = self._stages[action.stage_index], action.microbatch_index
        assert minibatch is not None
        stage.release(minibatch)
        self._finish_stage(stage.stage)


class _OneWayStage(PipelineStage):
    """A stage as the runtime sees it: messages come in and go out, shapes are known, and nothing ever comes back."""

    def __init__(
        self,
        stage: Stage,
        *,
        inlet: Inlet | None,
        window: int,
        ahead: int,
        blocks: int,
        device: torch.device,
        group: dist.ProcessGroup | None,
    ) -> None:
        super().__init__(stage, stage.k, blocks, device, group=group)
        self.stage, self.inlet = stage, inlet
        self.ring: list[Tensor | None] = [None] * ahead
        self.rows: Sequence[int] = ()
        source = None if self.is_first else stage.k - 1
        self.args_recv_info = {
            m: (_RecvInfo("h", source, buffer=None, tensor_meta=None, is_root_arg=self.is_first),)
            for m in range(window)
        }
        self.act_send_info = {0: [] if self.is_last else [stage.k + 1]}

    def get_fwd_recv_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        (info,) = self.args_recv_info[fwd_chunk_id]
        info.buffer = self._buffer(fwd_chunk_id % len(self.ring), rows=self.rows[fwd_chunk_id])
        return [dist.P2POp(dist.irecv, info.buffer, self._resolve_peer_global_rank(self.stage_index - 1), self.group)]

    def release(self, minibatch: int) -> None:
        """Let go of a minibatch, of which the runtime keeps input and output for a backward pass of its own."""
        del self.fwd_cache[minibatch]
        (info,) = self.args_recv_info[minibatch]
        info.buffer = None

    def _buffer(self, slot: int, *, rows: int) -> Tensor:
        assert self.inlet is not None
        buffer = self.ring[slot]
        if buffer is None or len(buffer) < rows:
            buffer = torch.empty(rows, *self.inlet.shape, dtype=self.inlet.dtype, device=self.device)
            self.ring[slot] = buffer
        return buffer[:rows]

    def _retrieve_recv_activations(self, fwd_chunk_id: int) -> tuple[Tensor | None]:
        (info,) = self.args_recv_info[fwd_chunk_id]
        return (info.buffer,)

    def _warmup_forward_vote(self, has_backward: bool, received_acc: Tensor | None = None) -> Tensor:
        return torch.ones(1, dtype=torch.int32)  # nobody is asked for shapes, so nothing needs to come back

    def _warmup_backward_result(self, received_result: Tensor | None = None) -> Tensor:
        return torch.ones(1, dtype=torch.int32)

    def _prepare_forward_infra(self, num_microbatches: int, args: Any, kwargs: Any = None, has_backward: bool = False):
        return None
