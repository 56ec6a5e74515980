"""Timelines: numbers of a run whose times are known, and the pictures of it."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blocklocal.lab.commands import timeline as command
from blocklocal.lab.errors import UserError
from blocklocal.pipeline import trace
from blocklocal.pipeline.analysis.timeline import Timeline
from blocklocal.pipeline.trace import Phase, Record

MINIBATCHES = 10


def lane(rank: int, *, start: float, forward: float, backward: float, wait: float) -> list[Record]:
    """A rank with one block, that waits before every forward pass but the first; sending takes no time."""
    records, now = [], start
    for m in range(MINIBATCHES):
        durations: dict[Phase, float] = {
            "wait": wait if m else 0.5,
            "forward": forward,
            "send": 0,
            "backward": backward,
        }
        for phase, seconds in durations.items():
            records.append(Record(rank, 0, rank, m, phase, now, now + seconds))
            now += seconds
    return records


def two_ranks() -> Timeline:
    first = lane(0, start=100.0, forward=1.0, backward=2.0, wait=0.0)
    second = lane(1, start=101.0, forward=0.5, backward=1.0, wait=1.5)
    return Timeline([*second, *first])


def test_numbers_of_a_known_run() -> None:
    timeline = two_ranks()
    assert timeline.ranks == [0, 1]
    assert timeline.blocks(1) == [1]
    assert timeline.fill == pytest.approx(1.0)
    assert timeline.stage_seconds == pytest.approx([3.0, 1.5])
    assert timeline.imbalance == pytest.approx(3.0 / 2.25)
    assert timeline.predicted_throughput == pytest.approx(1 / 3)
    assert timeline.throughput == pytest.approx(1 / 3)
    assert timeline.utilisation(0) == pytest.approx(1.0)
    assert timeline.utilisation(1) == pytest.approx(MINIBATCHES * 1.5 / (MINIBATCHES * 3.0 - 1.5))
    assert timeline.waiting(1) == pytest.approx(1 - timeline.utilisation(1))


@given(st.floats(-1e6, 1e6), st.floats(0.1, 10))
def test_a_clock_changes_no_share(offset: float, pace: float) -> None:
    one = two_ranks()
    other = Timeline([replace(r, start=pace * r.start + offset, end=pace * r.end + offset) for r in one.records])
    assert other.utilisation(1) == pytest.approx(one.utilisation(1), rel=1e-6)
    assert other.imbalance == pytest.approx(one.imbalance, rel=1e-6)
    assert other.fill == pytest.approx(pace * one.fill, rel=1e-6)


def test_messages_connect_a_send_with_the_forward_pass_of_the_next_rank() -> None:
    pairs = two_ranks().messages()
    assert len(pairs) == MINIBATCHES
    assert all((a.rank, b.rank, b.phase) == (0, 1, "forward") and a.minibatch == b.minibatch for a, b in pairs)


def test_no_records_no_timeline() -> None:
    with pytest.raises(ValueError, match="trace=True"):
        Timeline([])


def save(records: list[Record], folder: Path) -> None:
    (folder / command.FOLDER).mkdir()
    for rank in {record.rank for record in records}:
        lines = [json.dumps(vars(record)) + "\n" for record in records if record.rank == rank]
        (folder / command.FOLDER / f"{rank}.jsonl").write_text("".join(lines))


def test_the_command_draws_and_counts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    timeline = two_ranks()
    save(list(timeline.records), tmp_path)
    assert sorted(trace.load((tmp_path / "trace").iterdir()), key=str) == sorted(timeline.records, key=str)
    command.main([str(tmp_path)])
    out = capsys.readouterr().out
    assert "imbalance: 1.33" in out
    assert "throughput: 0.33 minibatches/s; the slowest rank allows 0.33" in out
    svg = (tmp_path / "timeline.svg").read_text()
    assert svg.count("<path") > 2 * 2 * MINIBATCHES
    events = json.loads((tmp_path / "timeline.json").read_text())["traceEvents"]
    busy = [event for event in events if event["ph"] == "X" and event["pid"] == 0 and event["cat"] != "wait"]
    assert sum(event["dur"] for event in busy) == pytest.approx(MINIBATCHES * 3e6)
    assert {event["ph"] for event in events} == {"M", "X", "s", "f"}


def test_the_command_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--trace"):
        command.main([str(tmp_path)])
    save(list(two_ranks().records), tmp_path)
    with pytest.raises(UserError, match=r"\.svg or \.png"):
        command.main([str(tmp_path), "--out", str(tmp_path / "picture.gif")])
