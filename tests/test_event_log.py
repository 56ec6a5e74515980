"""`bll train --tensorboard`: the event file holds the numbers of metrics.jsonl, also of a run that was resumed."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from blocklocal.lab.cli import main
from blocklocal.lab.runs.event_log import scalars

TINY = ["--train-size=64", "--test-size=20", "--batch-size=16", "--blocks=2"]


def test_every_number_has_a_path() -> None:
    record = {"epoch": 3, "train_loss": [1.5, 2.5], "borders": [{"agreement": 0.1}], "seconds": 7.0}
    assert dict(scalars(record)) == {
        "epoch": 3,
        "train_loss/0": 1.5,
        "train_loss/1": 2.5,
        "borders/0/agreement": 0.1,
        "seconds": 7.0,
    }


def test_without_the_package_nothing_begins(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr("blocklocal.lab.runs.event_log.find_spec", lambda name: None)
    assert main(["train", *TINY, "--tensorboard", f"--out={tmp_path / 'run'}"]) == 2
    assert capsys.readouterr().err.splitlines()[-1].endswith("pip install tensorboard")
    assert not (tmp_path / "run").exists()


@pytest.mark.filterwarnings("default")  # TensorBoard's own
def test_the_numbers_are_those_of_the_metrics(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="make frameworks installs tensorboard")
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    make_ndarray = pytest.importorskip("tensorboard.util.tensor_util").make_ndarray

    run = tmp_path / "run"
    assert main(["train", *TINY, "--epochs=3", "--tensorboard", f"--out={run}"]) == 0
    lines = (run / "metrics.jsonl").read_text().splitlines()
    for _ in range(2):  # a run that goes on begins its event file anew
        assert main(["train", "--resume", "--tensorboard", f"--out={run}"]) == 0
    (file,) = (run / "tensorboard").iterdir()
    events = accumulator.EventAccumulator(str(file), size_guidance={"tensors": 0})
    events.Reload()
    found = {
        (tag, event.step): make_ndarray(event.tensor_proto).item()
        for tag in events.Tags()["tensors"]
        for event in events.Tensors(tag)
    }
    expected = {(tag, record["epoch"]): number for record in map(json.loads, lines) for tag, number in scalars(record)}
    assert found.keys() == expected.keys()
    assert all(found[key] == number or math.isnan(number) for key, number in expected.items())
