"""Planning: costs of blocks that sleep, read off a clock that only sleep moves; predictions against all placements."""

import re
from itertools import combinations, pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from blocklocal.lab.cli import main
from blocklocal.lab.errors import UserError
from blocklocal.lab.pipeline_bench.baselines import learner
from blocklocal.lab.pipeline_bench.plan import advice, parse_link
from blocklocal.lab.pipeline_bench.predict import Costs, measure, predict
from blocklocal.lab.pipeline_bench.workloads import CHAINS
from blocklocal.pipeline.analysis.programs import Cost
from blocklocal.pipeline.analysis.simulator import Link

PARTS = (1, 2, 4, 8)


def costs(*blocks: Cost, ranks: int) -> Costs:
    return Costs(list(blocks), {m: list(blocks) for m in {*PARTS, ranks}})


def test_measured_costs_are_those_of_the_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """20 ms forward and 40 ms backward for 64 rows of 4096 numbers, in proportion for fewer rows."""
    chain = CHAINS["devices"](3)
    model = learner(chain, "bll-paper")
    before = [parameter.clone() for parameter in model.parameters()]
    now = [0.0]
    monkeypatch.setattr("time.sleep", lambda seconds: now.__setitem__(0, now[0] + seconds))
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    found = measure(model, chain.x, chain.y, ranks=3, message=torch.bfloat16)
    monkeypatch.undo()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)), "a copy is measured"
    assert [(c.forward, c.backward, c.update) for c in found.local] == [pytest.approx((0.02, 0.04, 0.0))] * 3
    assert [c.message for c in found.local] == [2 * 64 * 4096, 2 * 64 * 4096, 2 * 64 * 10]
    assert list(found.end_to_end) == [1, 2, 4, 8, 3]
    for m, blocks in found.end_to_end.items():
        rows = 64 // m * m
        assert [(c.forward, c.backward) for c in blocks] == [pytest.approx((0.02 * rows / 64, 0.04 * rows / 64))] * 3
        assert blocks[0].message == 4 * 64 * 4096
    assert found.end_to_end[1][2].weights == 4 * (1 + 4096 * 10 + 10)


seconds = st.floats(0.1, 5.0)


@given(st.lists(st.tuples(seconds, seconds), min_size=1, max_size=6))
def test_no_placement_is_better(times: list[tuple[float, float]]) -> None:
    """Where messages take no time, the least that the busiest rank can have."""
    found = predict(costs(*(Cost(*time) for time in times), ranks=len(times)), speeds=(1.0,) * len(times), link=Link())
    for n, pace in enumerate(found.block_local, start=1):
        cuts = [(0, *inner, len(times)) for inner in combinations(range(1, len(times)), n - 1)]
        busiest = [max(sum(map(sum, times[a:b])) for a, b in pairwise(cut)) for cut in cuts]
        assert pace == pytest.approx(min(busiest))
    assert found.alone == pytest.approx(sum(map(sum, times)))


def test_other_ways_by_their_closed_forms() -> None:
    link = Link(latency=0.1, bandwidth=50.0)
    blocks = [Cost(1.0, 2.0, update=0.5, weights=100.0)] * 6
    free = predict(costs(*blocks, ranks=3), speeds=(1.0,) * 3, link=Link()).others
    assert list(free) == ["GPipe, M=2", "GPipe, M=4", "GPipe, M=8", "1F1B, M=4", "1F1B, M=8", "data parallel"]
    for name, pace in list(free.items())[:-1]:
        m = int(name[-1])
        assert pace == pytest.approx(6.0 * (m + 3 - 1) / m + 1.0), "two blocks on each of three ranks"
    assert free["data parallel"] == pytest.approx(18.0 / 3 + 3.0)
    slow = predict(costs(*blocks, ranks=3), speeds=(1.0,) * 3, link=link).others
    assert slow["data parallel"] == pytest.approx(18.0 / 3 + 3.0 + 4 * (0.1 + 600.0 / 3 / 50.0))
    assert not predict(costs(*blocks, ranks=1), speeds=(1.0,), link=link).others


def test_a_slow_rank_gets_less_and_counts_for_all() -> None:
    blocks = [Cost(1.0, 2.0, update=0.5, weights=100.0)] * 6
    found = predict(costs(*blocks, ranks=2), speeds=(1.0, 0.5), link=Link())
    assert [placement.ranks for placement in found.placements] == [(0,) * 6, (0, 0, 0, 0, 1, 1)]
    assert found.block_local == [pytest.approx(6 * 3.5), pytest.approx(4 * 3.5)]
    assert found.work(found.placements[1]) == [pytest.approx(4 * 3.5), pytest.approx(2 * 3.5 / 0.5)]
    assert found.others["data parallel"] == pytest.approx((18.0 / 2 + 3.0) / 0.5), "half of the images for each"
    even = predict(costs(*[Cost(1.0, 2.0)] * 6, ranks=2), speeds=(1.0, 0.5), link=Link())
    assert even.others["GPipe, M=4"] == pytest.approx(12.0 * (4 + 2 - 1) / 4), "both stages take 12 s"


@pytest.mark.parametrize("speeds", [["1"], ["1", "1", "1"], ["1", "0"], ["1", "-2"], ["inf", "1"]])
def test_speeds_are_one_per_rank(speeds: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["blocks", "mlp", "--plan=2", "--speeds", *speeds]) == 2
    assert re.search(r"--speeds .*(a number above 0 for each of 2 ranks|out of range)", capsys.readouterr().err)


def test_advice_names_what_limits() -> None:
    blocks = [Cost(1.0, 2.0, message=8.0), Cost(0.5, 1.0, message=80.0), Cost(0.5, 1.0)]
    free = advice(predict(costs(*blocks, ranks=3), speeds=(1.0,) * 3, link=Link()))
    assert "placement=[0, 1, 1], 2.00 times as fast" in free, "a third rank would not make it faster"
    assert "limits it is rank 0, 3000.0 ms of work (mean: 3000.0 ms)" in free
    late = advice(predict(costs(*blocks, ranks=2), speeds=(1.0,) * 2, link=Link(latency=0.5, bandwidth=2.0)))
    assert "placement=[0, 1, 1]" in late
    assert "limits it is the link, 4500.0 ms for the output of block 0 (work: 3000.0 ms)" in late
    cut_off = advice(predict(costs(*blocks, ranks=2), speeds=(1.0,) * 2, link=Link(bandwidth=0.1)))
    assert "placement=[0, 0, 0], 1.00 times as fast" in cut_off


def test_faster_ways_are_named() -> None:
    local, plain = [Cost(2.0, 4.0)] * 2, [Cost(0.5, 1.0)] * 2
    line = advice(predict(Costs(local, dict.fromkeys(PARTS, plain)), speeds=(1.0,) * 2, link=Link()))
    assert "0.50 times as fast" in line
    assert "predicted to be faster: backpropagation, alone, GPipe, M=2" in line
    assert "data parallel" in line


@pytest.mark.parametrize(
    ("text", "link"),
    [
        ("", Link()),
        ("100mbit", Link(bandwidth=12.5e6)),
        ("100,0.5", Link(latency=0.5e-3, bandwidth=12.5e6)),
        ("2.5gbit,1ms", Link(latency=1e-3, bandwidth=312.5e6)),
    ],
)
def test_links(text: str, link: Link) -> None:
    assert parse_link(text) == link


@pytest.mark.parametrize("text", ["fast", "0mbit", "-1", "100mbyte", "100mbit,", "100mbit 1ms"])
def test_links_unheard_of(text: str) -> None:
    with pytest.raises(UserError, match="100mbit or 1gbit"):
        parse_link(text)


def test_the_command_shows_the_placement(capsys: pytest.CaptureFixture[str]) -> None:
    args = ["blocks", "cnn", "--size=8", "--batch-size=8", "--plan=2", "--link=100mbit", "--message-dtype=bf16"]
    assert main(args) == 0
    *_, last = out = capsys.readouterr().out.splitlines()
    cells = [[cell.strip() for cell in line.strip("│").split("│")] for line in out if line.startswith("│")]
    blocks, ways = [row for row in cells if len(row) == 6], {row[0]: row[1:] for row in cells if len(row) == 3}
    assert [row[0] for row in blocks] == ["0", "1", "2", "3"]
    assert [row[1] for row in blocks[:2]] == ["layer1", "layer2"]
    ranks = [int(row[-1]) for row in blocks]
    assert ranks == sorted(ranks)
    assert set(ranks) == {0, 1}
    assert ways["backpropagation, alone"][1] == "1.00"
    assert {"block-local, ranks: 1", "block-local, ranks: 2", "GPipe, M=4", "1F1B, M=2", "data parallel"} <= set(ways)
    assert "GPipe, M=8" not in ways, "parts of one image"
    placed = re.fullmatch(r"advice: placement=\[([01, ]+)\], .* what limits it is .*", last)
    assert placed is not None
    assert [int(rank) for rank in placed[1].split(",")] in (ranks, [0] * 4)
