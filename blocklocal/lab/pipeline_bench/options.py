"""The options of `bll bench --pipeline`, and what they name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch.distributed.pipelining import Schedule1F1B, ScheduleGPipe
from tyro.conf import FlagCreatePairsOff

from blocklocal.lab.environment import find_interface
from blocklocal.lab.errors import UserError
from blocklocal.lab.ranges import Range
from blocklocal.lab.training import rules
from blocklocal.pipeline.analysis.programs import gpipe, one_forward_one_backward

MESSAGES = {"fp32": torch.float32, "bf16": torch.bfloat16}
BLOCKS, ROWS = 4, 64  # of a model, and of a minibatch: what all of them can be cut into
SCHEDULES = {"GPipe": (ScheduleGPipe, gpipe), "1F1B": (Schedule1F1B, one_forward_one_backward)}


@dataclass(frozen=True)
class Options:
    """Measure blocks over processes in ms per minibatch, against one process, GPipe, 1F1B and data parallelism."""

    model: Literal["mlp", "cnn", "devices"] = "mlp"
    """four blocks of Linear(1024); four of convolutions; or one block per process that sleeps instead of computing"""
    processes: Annotated[int, Range(least=2, most=16)] = 2
    """number of processes, with one thread each"""
    rule: str = "bll-paper"
    """learning rule of the blocks, as for bll train"""
    message_dtype: Literal["fp32", "bf16"] = "fp32"
    """precision of the messages between blocks"""
    microbatches: Annotated[tuple[int, ...], Range(least=1, most=64)] = (2, 4, 8)
    """numbers of microbatches for GPipe and, from the number of processes on, for 1F1B"""
    minibatches: Annotated[int, Range(least=2)] = 16
    """measured minibatches per round of a pipeline, after the first 8"""
    rounds: Annotated[int, Range(least=1)] = 5
    """how often each baseline is measured"""
    interface: str = ""
    """network interface for the messages (default: the loopback of this machine)"""
    json: Annotated[bool, FlagCreatePairsOff] = False
    """print one JSON object as the last line"""

    def check(self) -> None:
        """Check the options. UserError: some do not go together."""
        if not rules.find(self.rule).in_blocks:
            raise UserError(f"--rule {self.rule} trains the model whole: choose one in blocks, such as bll")
        if self.model != "devices" and self.processes > BLOCKS:
            raise UserError(f"--processes {self.processes}: 2 to 4 for the four blocks of a model, to 16 for devices")
        for m in self.microbatches:
            if ROWS % m:
                raise UserError(f"--microbatches {m} does not divide the {ROWS} rows of a minibatch")
        if len(set(self.microbatches)) < len(self.microbatches):
            raise UserError(f"--microbatches {' '.join(map(str, self.microbatches))}: name each once")
        if self.interface:
            find_interface(self.interface)

    @property
    def end_to_end(self) -> list[tuple[str, int]]:
        """The schedules with their numbers of microbatches."""
        return [(name, m) for name in SCHEDULES for m in self.microbatches if name == "GPipe" or m >= self.processes]
