"""The examples do what they say."""

import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_own_loop() -> None:
    assert runpy.run_path(str(EXAMPLES / "own_loop.py"))["main"](epochs=6) > 0.9


@pytest.mark.parametrize("name", ["own_term_and_head", "own_family", "own_feedback"])
def test_parts_of_ones_own(name: str) -> None:
    assert runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"]() > 0.85


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_examples_are_short(path: Path) -> None:
    assert len(path.read_text().splitlines()) < 60
