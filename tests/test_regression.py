"""Tables with a number to predict: what is read, what is trained, tested and refused, against plain PyTorch."""

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from block_folders import options, train_chain
from interruption import interrupted
from safetensors.torch import load_file
from torch.nn import functional as F

from blocklocal.lab.bench.step_cost import Cost
from blocklocal.lab.cli import main
from blocklocal.lab.data.table import load_table
from blocklocal.lab.errors import UserError
from blocklocal.lab.models import build
from blocklocal.lab.report.content import compose
from blocklocal.lab.report.table import tabulate
from blocklocal.lab.runs.folder import Run
from blocklocal.lab.runs.history import read
from blocklocal.lab.settings import Settings
from blocklocal.lab.sweeps.pareto import Estimate, Point, front
from blocklocal.lab.tasks.find import load_task
from blocklocal.lab.tasks.measure import RMSE, measures_of
from blocklocal.lab.tasks.outline import task_without_data
from blocklocal.lab.tasks.regression import Regression, Standardisation
from blocklocal.lab.training.recipes import recipe
from blocklocal.lab.training.run import train
from blocklocal.lab.training.trained import load_trained
from blocklocal.lab.training.trainer import SingleTrainer

ROWS = 105


def table(folder: Path, **columns: object) -> str:
    """A file of three features and a target of mean 1e6 and deviation 2e3 that follows from them."""
    numbers = np.random.default_rng(0)
    x = numbers.normal(size=(ROWS, 3))
    y = 1e6 + 2e3 * (x @ [0.8, -0.5, 0.3] + 0.1 * numbers.normal(size=ROWS))
    frame = pd.DataFrame(x, columns=["a", "b", "c"]).assign(y=y, **columns)
    frame.to_csv(folder / "table.csv", index=False)
    return f"table:{folder / 'table.csv'}"


def settings(folder: Path, **changes: object) -> Settings:
    small = {"target": "y", "blocks": 2, "model_args": ("width=8", "depth=2"), "epochs": 2, "batch_size": 8}
    return replace(recipe(table(folder)), **{**small, "out": str(folder / "run"), "device": "cpu", **changes})


@pytest.mark.parametrize(
    ("values", "kind", "numbers"),
    [
        ([0.5, 1.0], "auto", True),
        ([0.0, 1.0], "auto", False),
        (range(20), "auto", False),
        (range(21), "auto", True),
        (range(20), "numbers", True),
        (range(21), "classes", False),
        (["low", "high"], "auto", False),
        ([True, False], "auto", False),
    ],
)
def test_fractions_and_many_whole_numbers_are_predicted_as_numbers(tmp_path, values, kind, numbers):
    column = [list(values)[i % len(values)] for i in range(ROWS)]
    file = table(tmp_path, z=column).removeprefix("table:")
    data = load_table(file, target="z", target_type=kind)
    assert (not data.classes) == numbers
    if numbers:
        assert data.test.labels.flatten().tolist() == column[4::5]
        assert data.train.labels.flatten().tolist() == [y for i, y in enumerate(column) if i % 5 != 4]


@pytest.mark.parametrize(
    ("column", "options", "words"),
    [
        (["word"] * ROWS, {"target_type": "numbers"}, "holds words: leave --target-type numbers out"),
        ([math.nan] + [0.5, 2.0] * 52, {}, "row 0 has no number"),
        ([0.5] + [math.inf, 1.0] * 52, {}, "row 1 is infinite"),
        ([2.5] * ROWS, {}, "the targets of the training rows are all the same"),
        ([1.0] + [2.5e200, -1e200] * 52, {"target_type": "numbers"}, "too large for their squares"),
    ],
)
def test_what_is_no_number_is_refused(tmp_path, column, options, words):
    data = table(tmp_path, z=column)
    with pytest.raises(UserError, match=words):
        load_task(Settings(data=data, target="z", **options), device=torch.device("cpu"))


@pytest.mark.parametrize(
    ("option", "words"),
    [
        (["--add-beliefs"], "--add-beliefs is for classes, and"),
        (["--label-smoothing=0.1"], "--label-smoothing is for classes, and"),
        (["--softness=0.1"], "--softness is for classes, and"),
        (["--rule=predsim"], "rule 'predsim': Similarity() compares patterns"),
        (["--rule=drtp"], "rule 'drtp': it takes targets for the sign of the error"),
        (["--head=evidence"], 'head="evidence" compares classes'),
    ],
)
def test_what_needs_classes_is_one_line(tmp_path, capsys, option, words):
    out = tmp_path / "run"
    assert main(["train", table(tmp_path), "--target=y", "--epochs=1", f"--out={out}", *option]) == 2
    said = capsys.readouterr().err
    assert words in said
    assert said.count("\n") == 1
    assert not out.exists()


def test_the_error_of_every_exit_is_that_of_the_saved_weights(tmp_path, capsys):
    """By hand: the table with pandas, the exits from the files of weights, the error in the unit of the column."""
    chosen = settings(tmp_path, validation=12)
    told = train(chosen)
    frame = pd.read_csv(chosen.data.removeprefix("table:"))
    test = np.arange(ROWS) % 5 == 4
    x, y = frame[["a", "b", "c"]].to_numpy(), frame["y"].to_numpy()
    x = torch.tensor((x - x[~test].mean(0)) / x[~test].std(0), dtype=torch.float32)[test]
    facts = Run(tmp_path / "run").facts()["data"]
    learner = load_trained(Run(tmp_path / "run"), data=None, device="cpu", trust=False).learner
    model = build("mlp", channels=3, size=(1, 1), classes=1, arguments={"width": 8, "depth": 2})
    model.load_state_dict(load_file(tmp_path / "run" / "model.safetensors"))
    with torch.no_grad():
        exits = [learner.predictor(exit=0).eval()(x), model.eval()(x)]

    def error(prediction: torch.Tensor) -> float:
        ours = prediction[:, 0].double().numpy() * facts["target_deviation"] + facts["target_mean"]
        return float(np.sqrt(np.mean((ours - y[test]) ** 2)))

    record = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert record["test_rmse"] == pytest.approx([error(prediction) for prediction in exits], rel=1e-5)
    first, last = record["exit_weights"]
    together = first * exits[0] + last * exits[1]
    assert record["test_rmse_all"] == pytest.approx(error(together), rel=1e-5)
    assert (told["rmse"], told["rmse_all"]) == (record["test_rmse"][-1], record["test_rmse_all"])
    assert not any("accuracy" in name or "loss" in name for name in record if name != "train_loss")
    for exit, value in (("0", record["test_rmse"][0]), ("all", record["test_rmse_all"])):
        capsys.readouterr()
        assert main(["eval", str(tmp_path / "run"), f"--exit={exit}", "--device=cpu"]) == 0
        assert json.loads(capsys.readouterr().out.splitlines()[-1])["rmse"] == pytest.approx(value)
    assert main(["eval", str(tmp_path / "run"), "--exit=0.9"]) == 2
    assert "is a probability of classes, and numbers have none" in capsys.readouterr().err


def test_backpropagation_of_the_squared_error_is_plain_pytorch(tmp_path):
    chosen = settings(tmp_path, rule="bp", schedule="constant", warmup=0.0, weight_decay=0.0, epochs=1)
    train(chosen)
    task = load_task(chosen, device=torch.device("cpu"))
    torch.manual_seed(0)
    model = task.build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=chosen.lr, weight_decay=0.0)
    for x, y in task.training_batches(1):
        F.mse_loss(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    saved = load_file(tmp_path / "run" / "model.safetensors")
    assert all(torch.equal(saved[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("changes", [{}, {"offload": "cpu", "validation": 12}])
def test_an_interrupted_run_resumes_bit_for_bit(tmp_path, changes):
    """One in memory, and one with blocks in host memory, against a run that was not interrupted, in memory."""
    chosen = settings(tmp_path, **changes, save_every=2)
    train(replace(chosen, offload="none", out=str(tmp_path / "whole")))
    with interrupted(SingleTrainer, epoch=2, step=3), pytest.raises(KeyboardInterrupt, match="epoch 2, step 2"):
        train(chosen)
    train(replace(chosen, resume=True))
    assert timeless(tmp_path / "run") == timeless(tmp_path / "whole")
    saved = [load_file(tmp_path / name / "model.safetensors") for name in ("whole", "run")]
    assert all(torch.equal(saved[0][name], saved[1][name]) for name in saved[0])


def test_blocks_one_at_a_time_are_merged(tmp_path):
    runs = train_chain(tmp_path, settings(tmp_path, out=None, at=("layer1",), blocks=4), blocks=2)
    out = str(tmp_path / "merged")
    assert main(["merge", *(str(run.path) for run in runs), f"--out={out}"]) == 0
    last = timeless(tmp_path / "merged")[-1]
    assert last["test_rmse"] == [run.records()[-1]["test_rmse"][0] for run in runs]
    content = compose([read(tmp_path / "merged")])
    columns = tabulate(content.rows)
    assert columns["all exits RMSE"] == [RMSE.show(last["test_rmse_all"], finer=1)]
    assert "accuracy %" not in columns
    assert {"RMSE of the last exit", "test RMSE"} <= {plot.figure.axes[0].get_ylabel() for plot in content.plots}


def test_a_task_without_data_is_the_same(tmp_path):
    task = load_task(settings(tmp_path), device=torch.device("cpu"))
    other = task_without_data(task.settings, json.loads(json.dumps(task.facts)))
    assert isinstance(task, Regression)
    assert isinstance(other, Regression)
    assert other.facts == {name: fact for name, fact in task.facts.items() if name != "digest"}
    assert (other.grading, other.shape) == (task.grading, task.shape)
    assert measures_of("table", task.facts) == task.shown
    (x, y), (meta, targets) = task.few(4), other.few(4)
    assert (meta.shape, targets.shape, targets.dtype) == (x.shape, y.shape, y.dtype)


def test_targets_are_standardised_whatever_their_order():
    numbers = torch.randn(999, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 1e-3 + 1e6
    scale = Standardisation.of(numbers)
    assert scale == Standardisation.of(numbers.flip(0))
    assert scale.mean == pytest.approx(float(np.mean(numbers.numpy())), rel=1e-14)
    assert scale.deviation == pytest.approx(float(np.std(numbers.numpy())), rel=1e-6)
    standard = scale(numbers)
    assert (standard.dtype, float(standard.double().mean().abs()) < 1e-6) == (torch.float32, True)


def test_the_better_of_two_errors_is_the_lower_one():
    cost = Cost(1.0, 1.0, 1.0)

    def point(time: float, error: float, together: float) -> Point:
        last, both = Estimate(error, None), Estimate(together, None)
        return Point("", 1, 2, last, both, last, both, replace(cost, time=time), RMSE)

    cheap, worse, better = point(1.0, 60.0, 65.0), point(2.0, 61.0, 62.0), point(3.0, 70.0, 55.0)
    assert front([cheap, worse, better]) == [cheap, better]
    assert (cheap.combines, better.combines, better.error(55.0)) == (False, True, 55.0)


@pytest.mark.long
def test_over_processes_it_is_the_same_run(tmp_path):
    chosen = settings(tmp_path, validation=12)
    train(chosen)
    given = [*options(replace(chosen, out=str(tmp_path / "launched")))]
    subprocess.run([sys.executable, "-m", "blocklocal", "launch", *given], check=True, capture_output=True)
    assert timeless(tmp_path / "launched") == timeless(tmp_path / "run")


def timeless(run: Path) -> list[dict[str, Any]]:
    """The records of a run without its times and its memory."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    own = ("seconds", "peak_memory_mib")
    return [{name: value for name, value in json.loads(line).items() if name not in own} for line in lines]
