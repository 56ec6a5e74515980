"""Balanced cuts: the partition against brute force, the profile against counting by hand and against real blocks."""

import itertools
import math

import pytest
import torch
import zoo
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import blocklocal as bll
from blocklocal.balance import FREE, IMPOSSIBLE, Cost, Profile, measure, partition
from blocklocal.candidates import candidates
from blocklocal.memory import MemoryTracker
from blocklocal.messages import BorderInput, BorderSpec
from blocklocal.split import cut

SCALARS = 8  # a sum and its gradient


@st.composite
def tables(draw: st.DrawFn) -> tuple[list[list[float]], int]:
    n = draw(st.integers(1, 7))
    row = st.lists(st.integers(0, 9) | st.just(math.inf), min_size=n, max_size=n)
    return draw(st.lists(row, min_size=n, max_size=n)), draw(st.integers(1, n))


@given(tables())
def test_partition_is_the_best_of_all(table: tuple[list[list[float]], int]) -> None:
    costs, blocks = table
    n = len(costs)

    def dearest(starts: tuple[int, ...]) -> float:
        edges = [0, *starts, n]
        return max(costs[first][end - 1] for first, end in itertools.pairwise(edges))

    found = partition([lambda first, last: costs[first][last]] * blocks, segments=n)
    assert len(found) == blocks - 1
    assert sorted(set(found)) == found
    assert dearest(tuple(found)) == min(map(dearest, itertools.combinations(range(1, n), blocks - 1)))


def test_partition_evens_out_the_other_blocks() -> None:
    seconds = [9, 1, 1, 1, 1]
    assert partition([lambda i, j: sum(seconds[i : j + 1])] * 3, segments=5) == [1, 3]


def test_costs_counted_by_hand() -> None:
    """16 samples in single precision. Backward: the incoming gradient, and those of the segment's input and weights."""
    wide, narrow = 16 * 8 * 4, 16 * 2 * 4
    in_first, in_last = 4 * (8 * 2 + 8), 4 * (2 * 8 + 2)
    segments = [nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 2), nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 2))]
    first, relu, last, pair = measure(segments, torch.randn(16, 2), repetitions=1).segments
    assert (first.output, first.kept, first.peak) == (wide, wide, wide + wide + narrow + in_first + SCALARS)
    assert (relu.output, relu.kept, relu.peak) == (wide, wide, 3 * wide + SCALARS)
    assert (last.output, last.kept, last.peak) == (narrow, narrow, 2 * narrow + wide + in_last + SCALARS)
    assert (pair.output, pair.kept) == (narrow, wide + narrow)  # tanh keeps its output, which the linear layer reads
    # tanh backward: its output, the gradients on both sides of it, those of the last layer's weights
    assert pair.peak == 3 * wide + narrow + in_last + SCALARS
    assert [cost.gradients for cost in (first, relu, last, pair)] == [in_first, 0, in_last, in_first + in_last]


def test_a_view_takes_no_memory() -> None:
    flat, linear = measure([nn.Flatten(), nn.Linear(6, 2)], torch.randn(4, 2, 3), repetitions=1).segments
    assert flat.kept == 0
    assert linear.kept == 4 * 2 * 4


@pytest.mark.parametrize("make", [zoo.perceptron, zoo.residual, zoo.preactivation], ids=lambda make: make.__name__)
def test_memory_of_blocks_is_an_upper_bound_of_what_they_take(make) -> None:
    """The peak of both passes of every possible block, its input among it, measured at once."""
    model, x = make()
    segments = list(cut(model, at=candidates(model)))
    profile = measure(segments, x, repetitions=1)
    inputs = [x]
    for segment in segments:
        inputs.append(segment(inputs[-1].detach()))
    for first, last in itertools.combinations_with_replacement(range(len(segments)), 2):
        h = inputs[first].detach().requires_grad_().clone()
        model.zero_grad(set_to_none=True)
        with MemoryTracker() as tracker:
            output = nn.Sequential(*segments[first : last + 1])(h)
            (1.0 * output).sum().backward()
        taken = tracker.timeline.peak + (h.nbytes if first else 0)
        assert taken <= profile.memory(first, last) <= 1.5 * taken
        if first == last:
            assert profile.memory(first, last) == taken


def test_costs_of_blocks_add_up_to_those_of_segments_and_border() -> None:
    segments = Cost(1.0, peak=10, kept=4, output=2), Cost(2.0, peak=20, kept=6, output=3), Cost(4.0, peak=5)
    dear = Cost(1.0, peak=10, kept=4, gradients=3), Cost(2.0, peak=20, kept=6, output=3, gradients=5), Cost(4.0, peak=5)
    profile = Profile(dear, (Cost(0.5, peak=7, gradients=40), Cost(0.25, peak=7, gradients=50), FREE))
    assert profile.memory(0, 0) == max(10 + 40, 4 + 7)  # the gradients of the head and of what follows stay alive
    assert profile.memory(0, 1) == max(10 + 3 + 5 + 50, 4 + 20 + 50)
    profile = Profile(segments, (Cost(0.5, peak=7), Cost(0.25, peak=100), FREE))
    assert [profile.time(0, 0), profile.time(0, 1), profile.time(1, 2)] == [1.5, 3.25, 6.0]
    assert profile.memory(0, 0) == max(10, 4 + 7)
    assert profile.memory(0, 1) == max(10 + 3, 4 + 20, 4 + 6 + 100)
    assert profile.memory(1, 2) == max(2 + 20 + 0, 2 + 6 + 5)
    assert Profile(segments, (IMPOSSIBLE, FREE, FREE)).time(0, 0) == math.inf


def test_measuring_changes_nothing() -> None:
    model, x = zoo.residual()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    random = torch.get_rng_state()
    measure(list(cut(model, at=candidates(model))), x)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert modes == [module.training for module in model.modules()]
    assert torch.equal(random, torch.get_rng_state())
    assert not x.requires_grad


def test_borders_are_measured_where_they_can_stand() -> None:
    segments, x = [nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 2)], torch.randn(16, 2)

    def border(h: Tensor, prediction: Tensor, layout: object):
        if h.shape[1] != 8:
            raise ValueError
        assert prediction.shape == (16, 2)
        return lambda h: torch.cat([h, h], 1).sum()

    profile = measure(segments, x, border=border, repetitions=1)
    assert profile.borders[2] == FREE
    doubled = 2 * 16 * 8 * 4
    assert profile.borders[0] == profile.borders[1]
    assert profile.borders[0].peak == doubled + 4  # and a sum
    narrow = measure([nn.Linear(2, 3), nn.Linear(3, 2)], x, border=border, repetitions=1)
    assert narrow.borders == (IMPOSSIBLE, FREE)


def starts(learner: bll.BlockLocal) -> list[str]:
    return [next(name for name, _ in block.named_parameters()) for block in learner.blocks]


@pytest.mark.parametrize("balance", ["time", "memory"])
def test_no_cut_where_the_head_cannot_stand(balance) -> None:
    model, x = zoo.residual()
    maps = ["stem", "stages.0", "stages.1.0", "stages.1"]
    assert candidates(model) == [*maps, "dropout"]
    options = {"classes": 4, "example": x, "loss": bll.Predictive("conv"), "balance": balance}
    assert starts(bll.BlockLocal(model, blocks=5, **options)) == starts(bll.BlockLocal(model, at=maps, **options))
    with pytest.raises(ValueError, match='head="conv" needs feature maps'):
        bll.BlockLocal(model, blocks=6, **options)


def test_a_dear_head_moves_the_cut() -> None:
    """The memory that the chosen cut really takes is near the least of all cuts, with a cheap head and a dear one."""
    widths = [8, 8, 8, 64, 64, 64, 64, 4]
    model = nn.Sequential(*(nn.Linear(a, b) for a, b in itertools.pairwise(widths)))
    x, chosen = torch.randn(32, 8), []
    for head in ("linear", dear):
        options = {"classes": 4, "example": x, "loss": bll.Predictive(head)}
        taken = {}
        for name in candidates(model):
            learner = bll.BlockLocal(model, at=[name], **options)
            taken[starts(learner)[1]] = max(peak(learner, k, x) for k in range(2))
        _, start = starts(bll.BlockLocal(model, blocks=2, balance="memory", **options))
        assert taken[start] <= 1.1 * min(taken.values())
        chosen.append(start)
    assert chosen[0] != chosen[1]


def dear(spec: BorderSpec) -> nn.Module:
    """A head that takes 64 times the memory of its input."""

    class Dear(nn.Module):
        def forward(self, message: BorderInput) -> Tensor:
            return message.statistics.repeat(1, 64).tanh()[:, : spec.targets.size]

    return Dear()


def peak(learner: bll.BlockLocal, k: int, x: Tensor) -> int:
    y, h = torch.zeros(len(x), dtype=torch.long), x
    for j in range(k):
        _, h = learner.local(j, h, y)
    h = h.detach().clone().requires_grad_()
    with MemoryTracker() as tracker:
        loss, _ = learner.local(k, h, y)
        torch.autograd.grad(loss, h)
    return tracker.timeline.peak + (h.nbytes if k else 0)


def test_balancing_on_memory_is_the_same_every_time() -> None:
    model, x = zoo.residual()
    found = {tuple(starts(bll.BlockLocal(model, blocks=3, classes=4, example=x, balance="memory"))) for _ in range(3)}
    assert len(found) == 1
