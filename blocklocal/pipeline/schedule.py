"""The block-local schedule: which rank does what, in which order, in a window of minibatches.

    rank 0 (blocks 0, 1):  0F0 0B0 1F0 1SEND_F0 1B0 0F1 0B1 ...
    rank 1 (blocks 2, 3):  2RECV_F0 2RECV_F1 2F0 2B0 2RECV_F2 3F0 3B0 ...

F is a block's forward pass with its local loss, B its local backward pass and optimizer step. The message leaves before
the local backward pass, and its receive is posted `prefetch` minibatches early, so that it travels while both sides
compute. No action sends or receives a gradient.

If a head looks through a copy of the next block's first unit, and that block is on the next rank, a refresh before
minibatch m is a message in the opposite direction, 2SEND_C2 and 1RECV_C2 for m = 2:

    rank 0:  ... 1F1 1SEND_F1 1RECV_C2 1B1 0F2 0B2 1F2 ...
    rank 1:  ... 2F1 2B1 2SEND_C2 2RECV_F2 2RECV_F3 3F1 3B1 2F2 ...

It leaves once block 2 has learnt from minibatch 1, and block 1 waits for it before minibatch 2. No receive is posted
across it: messages between two ranks have one order, in either direction, so that the ranks cannot deadlock.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, NamedTuple

from blocklocal.arguments import require, require_list, require_whole

Kind = Literal["F", "B", "SEND_F", "RECV_F", "SEND_C", "RECV_C"]


class Action(NamedTuple):
    """One action of one rank; `str` writes it as the literature on schedules does, such as 1SEND_F0.

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
    """The rank of each block: integers from 0, in ascending order, with none left out.

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
                f"placement {list(self.ranks)}: pass the rank of each block, from 0 on, in ascending order without gaps"
            )

    @staticmethod
    def even(blocks: int, *, ranks: int) -> Placement:
        """Place blocks as evenly as possible, with any extra ones on the first ranks."""
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


def schedule(
    placement: Placement, *, minibatches: int, prefetch: int, copies: Mapping[int, Collection[int]] | None = None
) -> dict[int, list[Action]]:
    """The actions of every rank in one window of minibatches.

    copies: for block k, the minibatches before which the first unit of block k + 1 is copied to its border.

    >>> print(*schedule(Placement((0, 1)), minibatches=1, prefetch=2)[0])
    0F0 0SEND_F0 0B0
    """
    require(placement, Placement, name="placement", needed="pass a Placement, such as Placement((0, 0, 1))")
    minibatches = require_whole(minibatches, name="minibatches", least=1)
    prefetch = require_whole(prefetch, name="prefetch", least=1)
    copies = {} if copies is None else copies
    require(copies, Mapping, name="copies", needed="pass the minibatches of each block, such as {0: [0, 3]}")
    for k, before in copies.items():
        require(before, Collection, name=f"copies[{k}]", needed="pass minibatches, such as [0, 3]")
        for m in before:
            require_whole(m, name=f"an item of copies[{k}]", least=0, most=minibatches - 1)
    return {
        rank: list(_actions(placement, rank, minibatches=minibatches, prefetch=prefetch, copies=copies))
        for rank in range(placement.size)
    }


def _actions(
    placement: Placement, rank: int, *, minibatches: int, prefetch: int, copies: Mapping[int, Collection[int]]
) -> Iterator[Action]:
    blocks = placement.blocks(rank)
    first, last = blocks[0], blocks[-1]
    given = copies.get(first - 1, ()) if placement.receives(first) else ()
    taken = copies.get(last, ()) if placement.sends(last) else ()
    expected, arrivals = 0, minibatches if placement.receives(first) else 0

    def before(m: int) -> Iterator[Action]:
        """The copy that the first block sends before minibatch m, and the receives to post then."""
        nonlocal expected
        if m in given:
            yield Action(first, "SEND_C", m)
        until = min([m + prefetch, arrivals, *(copy for copy in given if copy > m)])
        yield from (Action(first, "RECV_F", arrival) for arrival in range(expected, until))
        expected = max(expected, until)

    yield from before(0)
    if 0 in taken:
        yield Action(last, "RECV_C", 0)
    for m in range(minibatches):
        for k in blocks:
            yield Action(k, "F", m)
            if placement.sends(k):
                yield Action(k, "SEND_F", m)
                if m + 1 in taken:
                    yield Action(k, "RECV_C", m + 1)
            yield Action(k, "B", m)
            if k == first:
                yield from before(m + 1)
