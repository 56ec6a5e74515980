"""The options of `bll bench --pipeline`, and what they name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch.distributed.pipelining import Schedule1F1B, ScheduleGPipe
from tyro.conf import FlagCreatePairsOff

from blocklocal import BLL, BLL_PAPER
from blocklocal.pipeline.programs import gpipe, one_forward_one_backward

LOSSES = {"bll": BLL, "bll-paper": BLL_PAPER}
MESSAGES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SCHEDULES = {"GPipe": (ScheduleGPipe, gpipe), "1F1B": (Schedule1F1B, one_forward_one_backward)}


@dataclass(frozen=True)
class Options:
    """Milliseconds per minibatch of blocks over processes, beside one process, GPipe, 1F1B and data parallelism."""

    model: Literal["mlp", "cnn", "devices"] = "mlp"
    """four blocks of Linear(1024); four of convolutions; or a block per process that sleeps instead of computing"""
    processes: int = 2
    """processes, of one thread each"""
    rule: Literal["bll", "bll-paper"] = "bll-paper"
    """local loss at the borders"""
    message: Literal["fp32", "bf16"] = "fp32"
    """what travels between blocks"""
    microbatches: tuple[int, ...] = (2, 4, 8)
    """of GPipe and 1F1B, the latter with at least as many as processes"""
    minibatches: int = 16
    """measured minibatches per round of a pipeline, after the first 8"""
    rounds: int = 5
    """how often each contender has its turn"""
    interface: str = "lo"
    """network interface for the messages"""
    json: Annotated[bool, FlagCreatePairsOff] = False
    """print one JSON object as the last line"""

    @property
    def end_to_end(self) -> list[tuple[str, int]]:
        """Schedules, and their microbatches."""
        return [(name, m) for name in SCHEDULES for m in self.microbatches if name == "GPipe" or m >= self.processes]
