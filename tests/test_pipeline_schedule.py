"""Action lists: every rank does all of its work, in an order that can run, with messages forward only."""

import re
from itertools import combinations
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blocklocal import pipeline
from blocklocal.pipeline import Action, Placement, schedule, spread

placements = st.lists(st.integers(1, 3), min_size=1, max_size=5).map(
    lambda counts: Placement(tuple(rank for rank, count in enumerate(counts) for _ in range(count)))
)


def test_the_schedule_of_two_ranks_with_two_blocks_each() -> None:
    first, second = schedule(Placement((0, 0, 1, 1)), minibatches=3, prefetch=2).values()
    assert " ".join(map(str, first)) == "0F0 0B0 1F0 1SEND_F0 1B0 0F1 0B1 1F1 1SEND_F1 1B1 0F2 0B2 1F2 1SEND_F2 1B2"
    assert " ".join(map(str, second)) == "2RECV_F0 2RECV_F1 2F0 2B0 2RECV_F2 3F0 3B0 2F1 2B1 3F1 3B1 2F2 2B2 3F2 3B2"


def test_the_schedule_with_copies_before_the_first_and_the_third_minibatch() -> None:
    lists = schedule(Placement((0, 0, 1)), minibatches=3, prefetch=2, copies={0: [1], 1: [0, 2]})
    first, second = (" ".join(map(str, actions)) for actions in lists.values())
    assert first == ("1RECV_C0 0F0 0B0 1F0 1SEND_F0 1B0 0F1 0B1 1F1 1SEND_F1 1RECV_C2 1B1 0F2 0B2 1F2 1SEND_F2 1B2")
    assert second == "2SEND_C0 2RECV_F0 2RECV_F1 2F0 2B0 2F1 2B1 2SEND_C2 2RECV_F2 2F2 2B2"


refreshes = st.dictionaries(st.integers(0, 14), st.sets(st.integers(0, 8)))


@given(placements, st.integers(1, 9), st.integers(1, 4), refreshes)
def test_every_list_is_complete_and_can_run(
    placement: Placement, minibatches: int, prefetch: int, refreshes: dict[int, set[int]]
) -> None:
    copies = {k: {m for m in before if m < minibatches} for k, before in refreshes.items()}
    lists = schedule(placement, minibatches=minibatches, prefetch=prefetch, copies=copies)
    blocks = len(placement.ranks)
    done = [(k, kind, m) for actions in lists.values() for k, kind, m in actions]
    assert len(done) == len(set(done))
    for kind in ("F", "B"):
        assert {(k, m) for k, action, m in done if action == kind} == {
            (k, m) for k in range(blocks) for m in range(minibatches)
        }
    assert {(k + 1, m) for k, kind, m in done if kind == "SEND_F"} == {
        (k, m) for k, kind, m in done if kind == "RECV_F"
    }
    crossing = {(k, m) for k in range(blocks - 1) if placement.sends(k) for m in copies.get(k, ())}
    assert {(k, m) for k, kind, m in done if kind == "RECV_C"} == crossing
    assert {(k - 1, m) for k, kind, m in done if kind == "SEND_C"} == crossing
    assert {kind for _, kind, _ in done} <= {"F", "B", "SEND_F", "RECV_F", "SEND_C", "RECV_C"}
    assert_can_run(lists)
    for rank in range(placement.size - 1):
        last = placement.blocks(rank)[-1]
        there = [(kind[-1], m) for k, kind, m in lists[rank] if k == last and kind in ("SEND_F", "RECV_C")]
        here = [(kind[-1], m) for k, kind, m in lists[rank + 1] if k == last + 1 and kind in ("RECV_F", "SEND_C")]
        assert there == here, "messages between two ranks have one order, without which NCCL would wait for ever"


def assert_can_run(lists: dict[int, list[Action]]) -> None:
    """Every rank does what it can until all is done: a forward pass needs its input, a receive never waits."""
    remaining = {rank: list(actions) for rank, actions in lists.items()}
    done: set[Action] = set()
    while any(remaining.values()):
        before = len(done)
        for actions in remaining.values():
            while actions and needs(actions[0], lists) <= done:
                done.add(actions.pop(0))
        assert len(done) > before, f"all ranks wait: {remaining}"


def needs(action: Action, lists: dict[int, list[Action]]) -> set[Action]:
    """What must have been done, on this rank and on that before it."""
    k, kind, m = action
    every = {action for actions in lists.values() for action in actions}
    if kind in ("SEND_F", "B"):
        return {Action(k, "F", m)}
    if kind == "SEND_C":
        return {Action(k, "B", m - 1)} if m else set()
    if kind in ("RECV_F", "RECV_C"):
        return set()
    copied = {Action(k, "RECV_C", m), Action(k + 1, "SEND_C", m)}
    found = copied if copied & every else set()
    if k == 0:
        return found
    arrives = Action(k, "RECV_F", m) in every
    return found | ({Action(k, "RECV_F", m), Action(k - 1, "SEND_F", m)} if arrives else {Action(k - 1, "F", m)})


@given(placements, st.integers(1, 9), st.integers(1, 4))
def test_a_message_leaves_before_the_local_backward_and_is_expected_ahead(
    placement: Placement, minibatches: int, prefetch: int
) -> None:
    for actions in schedule(placement, minibatches=minibatches, prefetch=prefetch).values():
        at = {(kind, k, m): i for i, (k, kind, m) in enumerate(actions)}
        for (kind, k, m), i in at.items():
            if kind == "SEND_F":
                assert at["F", k, m] == i - 1
                assert at["B", k, m] == i + 1
            if kind == "RECV_F" and m >= prefetch:
                assert at["B", k, m - prefetch] == i - 1
                assert at["F", k, m - prefetch + 1] > i


@pytest.mark.parametrize("ranks", [(), (1, 1), (0, 2), (0, 1, 0), (0, 0, 2)])
def test_a_placement_is_consecutive(ranks: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="ascending order without gaps"):
        Placement(ranks)


@given(st.integers(1, 9), st.integers(1, 9))
def test_even_placements(blocks: int, ranks: int) -> None:
    if ranks > blocks:
        with pytest.raises(ValueError, match="every rank needs a block"):
            Placement.even(blocks, ranks=ranks)
        return
    counts = [len(Placement.even(blocks, ranks=ranks).blocks(rank)) for rank in range(ranks)]
    assert sum(counts) == blocks
    assert max(counts) - min(counts) <= 1


@given(
    st.integers(1, 7).flatmap(
        lambda n: st.lists(st.lists(st.floats(0.01, 10), min_size=n, max_size=n), min_size=1, max_size=4)
    )
)
def test_a_spread_is_as_even_as_any(seconds: list[list[float]]) -> None:
    """seconds: of each block on each rank, which need not be equally fast."""
    ranks, blocks = len(seconds), len(seconds[0])
    if ranks > blocks:
        with pytest.raises(ValueError, match="every rank needs a block"):
            spread(seconds)
        return

    def busiest(placement: Placement) -> float:
        return max(sum(seconds[rank][k] for k in placement.blocks(rank)) for rank in range(ranks))

    every = (
        Placement(tuple(sum(k >= start for start in starts) for k in range(blocks)))
        for starts in combinations(range(1, blocks), ranks - 1)
    )
    assert busiest(spread(seconds)) == pytest.approx(min(map(busiest, every)))


FOLDER = Path(pipeline.__file__).parent


@pytest.mark.parametrize("file", sorted(path.name for path in FOLDER.glob("*.py")))
def test_no_private_name_of_torch_is_used(file: str) -> None:
    source = (FOLDER / file).read_text()
    private = re.findall(
        r"^from torch\S* import .*\b_\w+|^from torch\S*\._|\b(?:torch|dist)(?:\.\w+)*\._\w+", source, re.M
    )
    assert not private
