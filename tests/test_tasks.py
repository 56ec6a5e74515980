"""The tasks of benchmarks/tasks.py, on few samples: every exit learns, in blocks as by backpropagation."""

from __future__ import annotations

import runpy
from dataclasses import replace
from pathlib import Path

import pytest

TASKS = runpy.run_path(str(Path(__file__).parents[1] / "benchmarks" / "tasks.py"))
LEAST = {"regression": 0.2, "several_labels": 0.6, "label_per_pixel": 0.12, "signal": 0.3}
"""More than a constant prediction reaches."""


@pytest.mark.parametrize("blocks", [False, True])
@pytest.mark.parametrize("name", LEAST)
def test_learns(name: str, blocks: bool) -> None:
    task = TASKS[name]()
    task = replace(task, x=task.x[:440], y=task.y[:440])
    scores = TASKS["score"](task, blocks=blocks, seed=0, epochs=4)
    assert len(scores) == (len(task.settings["at"]) + 2 if blocks else 2)
    assert scores[-1] > LEAST[name]
    assert scores[-2] > LEAST[name]
