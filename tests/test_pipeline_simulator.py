"""The simulator against closed forms and against a recursion over minibatches."""

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from blocklocal.pipeline import Placement, schedule
from blocklocal.pipeline.analysis.programs import (
    Cost,
    block_local,
    block_local_window,
    data_parallel,
    gpipe,
    one_forward_one_backward,
)
from blocklocal.pipeline.analysis.simulator import Compute, Link, Message, Post, Wait, simulate

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


@given(stages)
def test_a_copy_costs_the_time_until_the_next_block_has_learnt(times: list[tuple[float, float]]) -> None:
    """At every step: a block begins once the next one, which begins when its message leaves, has ended the last."""
    costs = [Cost(forward, backward) for forward, backward in times]
    alone = [forward + backward for forward, backward in times]
    pairs = [times[k][0] + alone[k + 1] for k in range(len(times) - 1)]
    assert block_local(costs, link=NOTHING, refresh=1, window=24) == pytest.approx(max(*alone, *pairs, 0))


@pytest.mark.parametrize(("count", "refresh"), [(2, 1), (5, 1), (2, 4), (5, 4), (8, 16)])
def test_a_refresh_of_even_blocks_costs_one_forward_pass_on_any_number_of_ranks(count: int, refresh: int) -> None:
    pace = block_local(even(count), link=NOTHING, refresh=refresh)
    assert pace == pytest.approx(3.0 + 1.0 / refresh)


def test_copies_over_a_slow_link_are_waited_for() -> None:
    costs, link = [Cost(forward=1.0, backward=2.0, copy=10.0)] * 2, Link(bandwidth=2.0)
    assert block_local(costs, link=link, refresh=1) == pytest.approx(1.0 + 3.0 + 10.0 / 2.0)


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


@given(stages, st.floats(0.0, 2.0), st.floats(0.0, 6.0), st.integers(1, 3))
def test_blocks_follow_the_recursion(
    times: list[tuple[float, float]], latency: float, size: float, prefetch: int
) -> None:
    """A forward pass needs its block free and its message there; a message a notice, and the one before it out."""
    minibatches = 12
    done, left = {}, {}
    for m in range(minibatches):
        for k, (forward, backward) in enumerate(times):
            begin = done.get((k, m - 1), 0.0)
            if k:
                notice = done.get((k, m - prefetch), 0.0) + latency
                sent = done[k - 1, m] - times[k - 1][1]
                left[k, m] = max(notice, sent, left.get((k, m - 1), 0.0)) + size
                begin = max(begin, left[k, m] + latency)
            done[k, m] = begin + forward + backward
    costs = [Cost(*time, message=size) for time in times]
    placement = Placement(tuple(range(len(times))))
    programs = [
        list(block_local_window(actions, costs, placement, first=0))
        for actions in schedule(placement, minibatches=minibatches, prefetch=prefetch).values()
    ]
    last = simulate(programs, link=Link(latency=latency, bandwidth=1.0))[-1]
    assert last == pytest.approx(done[len(times) - 1, minibatches - 1])


def test_a_slow_link_sets_the_pace() -> None:
    link = Link(latency=0.5, bandwidth=2.0)
    pace = block_local(even(3, message=8.0), link=link, window=400)
    assert pace == pytest.approx(8.0 / 2.0, rel=1e-2)  # receives are posted prefetch, so latency costs nothing
    assert block_local(even(3, message=4.0), link=link, window=400) == pytest.approx(3.0, rel=1e-2)  # 3 s with notice


@given(st.integers(2, 8), st.floats(0.0, 0.2), st.floats(1.0, 5.0))
def test_gpipe_over_a_slow_link_waits_for_a_notice_and_a_message_each_time(
    microbatches: int, latency: float, size: float
) -> None:
    forward, backward, message = (seconds / microbatches for seconds in (1.0, 2.0, 6.0 * size))
    assume(latency <= forward)  # the first notice is there before the first output
    passes = forward + backward + microbatches * (forward + backward + 2 * message + 4 * latency) - 2 * latency
    costs = [Cost(1.0, 2.0, message=6.0 * size)] * 2
    link = Link(latency=latency, bandwidth=1.0)
    assert gpipe(costs, microbatches=microbatches, link=link) == pytest.approx(passes)


def test_data_parallelism_is_a_ring_whose_last_bucket_comes_after_the_backward_pass() -> None:
    costs = even(4, weights=100.0)
    fast, slow = Link(bandwidth=1e9), Link(latency=0.1, bandwidth=50.0)
    assert data_parallel(costs, workers=4, link=fast) == pytest.approx(3.0)
    assert data_parallel(costs, workers=4, link=slow) == pytest.approx(1.0 + 2.0 + 6 * (0.1 + 100.0 / 50.0))
    ring, last = 6 * (0.1 + 75.0 / 50.0), 6 * (0.1 + 25.0 / 50.0)
    assert data_parallel(costs, workers=4, link=slow, bucket=100.0) == pytest.approx(1.0 + ring + last)


def test_messages_share_a_way_and_wait_for_both_sides() -> None:
    one, two = (Message(0, 1, 10.0, (i,)) for i in range(2))
    sender = [Post(one), Post(two), Compute(5.0), Wait(one), Wait(two)]
    receiver = [Compute(2.0), Post(one), Wait(one), Post(two), Wait(two)]
    assert simulate([sender, receiver], link=Link(bandwidth=10.0)) == [5.0, 4.0]


def test_a_sender_is_done_when_its_system_has_the_bytes() -> None:
    message = Message(0, 1, 10.0, ())
    programs = [[Post(message), Wait(message)]] * 2
    assert simulate(programs, link=Link(latency=1.0, bandwidth=2.0)) == [1.0, 7.0]
    assert simulate(programs, link=Link(latency=1.0, bandwidth=2.0, buffer=4.0)) == [4.0, 7.0]
    assert simulate(programs, link=Link(latency=1.0, bandwidth=2.0, buffer=0.0)) == [6.0, 7.0]


def test_a_notice_waits_behind_what_travels_the_same_way() -> None:
    """Rank 1 sends 10 s of gradient, then says that it expects an activation, which rank 0 could have sent at once."""
    gradient, activation = Message(1, 0, 10.0, ("B",)), Message(0, 1, 3.0, ("F",))
    first = [Post(gradient), Post(activation), Wait(gradient), Wait(activation)]
    second = [Compute(1.0), Post(gradient), Post(activation), Wait(activation)]
    assert simulate([first, second], link=Link(latency=0.5, bandwidth=1.0)) == [11.5, 11.0 + 0.5 + 3.0 + 0.5]


def test_programs_that_wait_for_each_other_are_refused() -> None:
    there, back = Message(0, 1, 1.0, ()), Message(1, 0, 1.0, ())
    first = [Post(back), Wait(back), Post(there)]
    second = [Post(there), Wait(there), Post(back)]
    with pytest.raises(ValueError, match="wait for each other"):
        simulate([first, second], link=NOTHING)
