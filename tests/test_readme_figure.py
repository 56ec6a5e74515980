"""The script that draws the README's figure measures what `bll bench` measures, and reads what the docs say."""

import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPT = runpy.run_path(str(ROOT / "benchmarks/readme_figure.py"))


def test_blocks_take_less_memory() -> None:
    peaks = [SCRIPT["memory_of"](rule, images=32).timeline.peak for rule in ("bp", "bll")]
    assert 0 < peaks[1] < peaks[0]


@pytest.mark.parametrize(
    ("runs", "key", "percent"),
    [("bp", "test_accuracy", 84.38), ("k4", "test_accuracy", 82.86), ("k4", "test_accuracy_all", 83.55)],
)
def test_accuracies_are_those_of_the_docs(runs: str, key: str, percent: float) -> None:
    found = SCRIPT["accuracies"](ROOT / "benchmarks/runs", f"gpu-cifar10-resnet20-{runs}-seed*", key)
    assert [len(run) for run in found] == [15, 15, 15]
    assert sum(run[-1] for run in found) / 3 == pytest.approx(percent, abs=0.01)
    assert f"{percent:.2f}" in (ROOT / "docs/accuracy.md").read_text()
