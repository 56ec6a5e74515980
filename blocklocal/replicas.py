"""The processes whose batches a closed-form feedback is fitted to when several train the same learner."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch.distributed as dist
from torch import Tensor

Group: TypeAlias = "dist.ProcessGroup | Literal[False] | None"
"""Processes that share something: those of a group, all of them (None), or none (False)."""


@dataclass(frozen=True)
class Replicas:
    """The processes that hold the same learner, each with its own share of every batch."""

    group: Group

    def sum(self, *tensors: Tensor) -> None:
        """Sum each tensor over the processes, in place."""
        if self.group is False or (self.group is None and processes() == 1):
            return
        for tensor in tensors:
            dist.all_reduce(tensor, group=self.group)

    def __deepcopy__(self, memo: dict) -> Replicas:
        return self  # a process group cannot be copied

    def __reduce__(self) -> tuple:
        return _restore, (self.group if self.group is False or self.group is None else "gone",)


def processes() -> int:
    """The number of processes of the default group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _restore(group: Literal[False, "gone"] | None) -> Replicas | None:
    """Restore after unpickling. A process group does not outlive its process: what is shared is then undecided."""
    return None if group == "gone" else Replicas(group)
