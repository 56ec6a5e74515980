"""The block-local schedule: which rank does what in which order, for a window of minibatches.

    rank 0 (blocks 0, 1):  0F0 0B0 1F0 1SEND_F0 1B0 0F1 0B1 ...
    rank 1 (blocks 2, 3):  2RECV_F0 2RECV_F1 2F0 2B0 2RECV_F2 3F0 3B0 ...

F is a block's forward pass with its local loss, B its local backward pass and optimizer step. The message leaves before
the local backward pass, and is expected `ahead` minibatches early, so that it travels while both sides compute. There
is no action that sends or receives a gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, NamedTuple

from blocklocal.arguments import require, require_list, require_whole

Kind = Literal["F", "B", "SEND_F", "RECV_F"]


class Action(NamedTuple):
    """One thing that one rank does; `str` writes it as the literature on schedules does, such as 1SEND_F0.

    >>> print(Action(block=1, kind="SEND_F", minibatch=0))
    1SEND_F0
    """

    block: int
    kind: Kind
    minibatch: int

    def __str__(self) -> str:
        return f"{self.block}{self.kind}{self.minibatch}"


@dataclass(frozen=True)
class Placement:
    """The rank of each block: whole numbers from 0, none left out, never falling.

    >>> Placement((0, 0, 1)).blocks(0)
    [0, 1]
    """

    ranks: Sequence[int]

    def __post_init__(self) -> None:
        require_list(self.ranks, name="placement", needed="pass the rank of each block, such as (0, 0, 1)")
        ranks = tuple(require_whole(rank, name=f"placement[{k}]", least=0) for k, rank in enumerate(self.ranks))
        object.__setattr__(self, "ranks", ranks)
        steps = [b - a for a, b in pairwise(self.ranks)]
        if not self.ranks or self.ranks[0] != 0 or any(step not in (0, 1) for step in steps):
            raise ValueError(
                f"placement {list(self.ranks)}: give each block its rank, from 0 on, consecutive blocks on a rank"
            )

    @staticmethod
    def even(blocks: int, *, ranks: int) -> Placement:
        """Nearly as many blocks on each rank, the first ranks having more."""
        blocks, ranks = require_whole(blocks, name="blocks", least=1), require_whole(ranks, name="ranks", least=1)
        if ranks > blocks:
            raise ValueError(f"{ranks} ranks for {blocks} blocks: every rank needs a block")
        return Placement(tuple(rank for rank in range(ranks) for _ in range(rank, blocks, ranks)))

    @property
    def size(self) -> int:
        """The number of ranks."""
        return self.ranks[-1] + 1

    def blocks(self, rank: int) -> list[int]:
        rank = require_whole(rank, name="rank", least=0, most=self.size - 1)
        return [k for k, owner in enumerate(self.ranks) if owner == rank]

    def receives(self, k: int) -> bool:
        """Whether the input of block k comes from another rank."""
        k = self._index(k)
        return k > 0 and self.ranks[k - 1] != self.ranks[k]

    def sends(self, k: int) -> bool:
        """Whether the output of block k goes to another rank."""
        k = self._index(k)
        return k + 1 < len(self.ranks) and self.ranks[k + 1] != self.ranks[k]

    def _index(self, k: int) -> int:
        return require_whole(k, name="k", least=0, most=len(self.ranks) - 1)


def schedule(placement: Placement, *, minibatches: int, ahead: int) -> dict[int, list[Action]]:
    """The actions of every rank in one window of minibatches.

    >>> print(*schedule(Placement((0, 1)), minibatches=1, ahead=2)[0])
    0F0 0SEND_F0 0B0
    """
    require(placement, Placement, name="placement", needed="pass a Placement, such as Placement((0, 0, 1))")
    minibatches = require_whole(minibatches, name="minibatches", least=1)
    ahead = require_whole(ahead, name="ahead", least=1)
    return {rank: _actions(placement, rank, minibatches=minibatches, ahead=ahead) for rank in range(placement.size)}


def _actions(placement: Placement, rank: int, *, minibatches: int, ahead: int) -> list[Action]:
    blocks = placement.blocks(rank)
    receives = [Action(blocks[0], "RECV_F", m) for m in range(minibatches if placement.receives(blocks[0]) else 0)]
    actions = receives[:ahead]
    for m in range(minibatches):
        for k in blocks:
            actions.append(Action(k, "F", m))
            if placement.sends(k):
                actions.append(Action(k, "SEND_F", m))
            actions.append(Action(k, "B", m))
            if k == blocks[0]:
                actions += receives[m + ahead : m + ahead + 1]
    return actions
