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
    first, second = schedule(Placement((0, 0, 1, 1)), minibatches=3, ahead=2).values()
    assert " ".join(map(str, first)) == "0F0 0B0 1F0 1SEND_F0 1B0 0F1 0B1 1F1 1SEND_F1 1B1 0F2 0B2 1F2 1SEND_F2 1B2"
    assert " ".join(map(str, second)) == "2RECV_F0 2RECV_F1 2F0 2B0 2RECV_F2 3F0 3B0 2F1 2B1 3F1 3B1 2F2 2B2 3F2 3B2"


@given(placements, st.integers(1, 9), st.integers(1, 4))
def test_every_list_is_complete_and_can_run(placement: Placement, minibatches: int, ahead: int) -> None:
    lists = schedule(placement, minibatches=minibatches, ahead=ahead)
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
    assert {kind for _, kind, _ in done} <= {"F", "B", "SEND_F", "RECV_F"}
    assert_can_run(lists)


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
    if kind in ("SEND_F", "B"):
        return {Action(k, "F", m)}
    if kind == "RECV_F" or k == 0:
        return set()
    arrives = any(Action(k, "RECV_F", m) in actions for actions in lists.values())
    return {Action(k, "RECV_F", m), Action(k - 1, "SEND_F", m)} if arrives else {Action(k - 1, "F", m)}


@given(placements, st.integers(1, 9), st.integers(1, 4))
def test_a_message_leaves_before_the_local_backward_and_is_expected_ahead(
    placement: Placement, minibatches: int, ahead: int
) -> None:
    for actions in schedule(placement, minibatches=minibatches, ahead=ahead).values():
        at = {(kind, k, m): i for i, (k, kind, m) in enumerate(actions)}
        for (kind, k, m), i in at.items():
            if kind == "SEND_F":
                assert at["F", k, m] == i - 1
                assert at["B", k, m] == i + 1
            if kind == "RECV_F" and m >= ahead:
                assert at["B", k, m - ahead] == i - 1
                assert at["F", k, m - ahead + 1] > i


@pytest.mark.parametrize("ranks", [(), (1, 1), (0, 2), (0, 1, 0), (0, 0, 2)])
def test_a_placement_is_consecutive(ranks: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="consecutive blocks"):
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
