"""The simulator against closed forms and against a recursion over minibatches."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blocklocal.pipeline import Placement, schedule
from blocklocal.pipeline.programs import (
    Cost,
    block_local,
    block_local_window,
    data_parallel,
    gpipe,
    one_forward_one_backward,
)
from blocklocal.pipeline.simulator import Compute, Link, Message, Post, Wait, simulate

NOTHING = Link()
seconds = st.floats(0.1, 5.0)
stages = st.lists(st.tuples(seconds, seconds), min_size=1, max_size=5)


def even(stages: int, *, message: float = 0.0, weights: float = 0.0) -> list[Cost]:
    return [Cost(forward=1.0, backward=2.0, message=message, weights=weights) for _ in range(stages)]


@given(stages)
def test_the_slowest_stage_sets_the_pace_of_blocks(times: list[tuple[float, float]]) -> None:
    costs = [Cost(forward, backward) for forward, backward in times]
    slowest = max(forward + backward for forward, backward in times)
    assert block_local(costs, link=NOTHING) == pytest.approx(slowest)
    whole = Placement((0,) * len(costs))
    assert block_local(costs, link=NOTHING, placement=whole) == pytest.approx(sum(map(sum, times)))


@given(st.integers(1, 6), st.integers(1, 8))
def test_bubbles_of_end_to_end_schedules(count: int, microbatches: int) -> None:
    """Equal stages, messages that take no time: (M + K - 1) / M of the work of a stage, for both schedules."""
    expected = 3.0 * (microbatches + count - 1) / microbatches
    assert gpipe(even(count), microbatches=microbatches, link=NOTHING) == pytest.approx(expected)
    assert one_forward_one_backward(even(count), microbatches=microbatches, link=NOTHING) == pytest.approx(expected)


def test_a_fixed_part_does_not_shrink_with_the_batch() -> None:
    cost = Cost(forward=1.0, backward=2.0, update=0.25, fixed=0.5)
    assert gpipe([cost], microbatches=4, link=NOTHING) == pytest.approx(4 * 2 * 0.5 + (0.5 + 1.5) + 0.25)
    assert data_parallel([cost], workers=2, link=NOTHING) == pytest.approx(2 * 0.5 + (0.5 + 1.5) / 2 + 0.25)


@given(stages, st.floats(0.0, 2.0), st.integers(1, 3))
def test_blocks_follow_the_recursion(times: list[tuple[float, float]], latency: float, ahead: int) -> None:
    """A forward pass needs its block free and its message there; a message both sides, and the one before it there."""
    minibatches = 12
    done, arrived = {}, {}
    for m in range(minibatches):
        for k, (forward, backward) in enumerate(times):
            begin = done.get((k, m - 1), 0.0)
            if k:
                posted = done.get((k, m - ahead), 0.0)
                sent = done[k - 1, m] - times[k - 1][1]
                arrived[k, m] = max(posted, sent, arrived.get((k, m - 1), 0.0)) + latency
                begin = max(begin, arrived[k, m])
            done[k, m] = begin + forward + backward
    programs = [
        list(block_local_window(actions, [Cost(*time) for time in times], Placement(tuple(range(len(times)))), first=0))
        for actions in schedule(Placement(tuple(range(len(times)))), minibatches=minibatches, ahead=ahead).values()
    ]
    last = simulate(programs, link=Link(latency=latency))[-1]
    assert last == pytest.approx(done[len(times) - 1, minibatches - 1])


def test_a_slow_link_sets_the_pace() -> None:
    link = Link(latency=0.5, bandwidth=2.0)
    pace = block_local(even(3, message=8.0), link=link, window=400)
    assert pace == pytest.approx(0.5 + 8.0 / 2.0, rel=1e-2)
    assert block_local(even(3, message=4.0), link=link, window=400) == pytest.approx(3.0, rel=1e-2)  # 2.5 s each


def test_data_parallelism_is_a_ring() -> None:
    costs = even(4, weights=100.0)
    fast, slow = Link(bandwidth=1e9), Link(latency=0.1, bandwidth=50.0)
    assert data_parallel(costs, workers=4, link=fast) == pytest.approx(3.0)
    assert data_parallel(costs, workers=4, link=slow) == pytest.approx(1.0 + 6 * (0.1 + 100.0 / 50.0))


def test_messages_share_a_way_and_wait_for_both_sides() -> None:
    one, two = (Message(0, 1, 10.0, (i,)) for i in range(2))
    sender = [Post(one), Post(two), Compute(5.0), Wait(one), Wait(two)]
    receiver = [Compute(2.0), Post(one), Wait(one), Post(two), Wait(two)]
    assert simulate([sender, receiver], link=Link(bandwidth=10.0)) == [5.0, 4.0]


def test_programs_that_wait_for_each_other_are_refused() -> None:
    there, back = Message(0, 1, 1.0, ()), Message(1, 0, 1.0, ())
    first = [Post(back), Wait(back), Post(there)]
    second = [Post(there), Wait(there), Post(back)]
    with pytest.raises(ValueError, match="wait for each other"):
        simulate([first, second], link=NOTHING)
