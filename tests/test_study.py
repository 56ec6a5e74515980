"""`bll study`: grids, costs, the front of a study, and a study from its command to its picture."""

import json
import subprocess
import sys
import time
from dataclasses import fields, replace
from itertools import pairwise

import pytest
import torch

from blocklocal.lab.bench import step_cost as costs_module
from blocklocal.lab.bench.step_cost import Cost, costs
from blocklocal.lab.cli import main
from blocklocal.lab.errors import UserError
from blocklocal.lab.runs.lock import is_held
from blocklocal.lab.settings import CHANGES, Settings
from blocklocal.lab.sweeps.grid import Row, read_grid
from blocklocal.lab.sweeps.pareto import Estimate, Point, front
from blocklocal.lab.sweeps.study import with_equal_time
from blocklocal.lab.training.rules import Changes

SMALL = Settings(model="mlp", batch_size=16, threads=1)
GRID = """# two ways
[{"rule": "bp"}, {"name": "two blocks", "blocks": 2, "head": "linear"}]
"""


def test_a_grid_is_a_list_of_settings_that_go_over_the_shared_ones(tmp_path):
    file = tmp_path / "grid.py"
    file.write_text('# comment\n[\n  {"rule": "bp"},  # whole\n  {"name": "x", "at": ["a", "b"], "lr": 1},\n]\n')
    bp, x = read_grid(file, shared=SMALL)
    assert bp == Row("rule bp", replace(SMALL, rule="bp"))
    assert x == Row("x", replace(SMALL, at=("a", "b"), lr=1.0))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "line"),
        ("[", "line 1"),
        ("{}", "one list"),
        ("[]", "one list"),
        ("[__import__('os').remove('x')]", "malformed"),
        ("[3]", "item 1 must be a dictionary"),
        ('[{"rule": "bp"}, {"head": 3}]', "item 2: head"),
        ('[{"layers": 3}]', "item 1: unknown setting 'layers'"),
        ('[{"seed": 3}]', "item 1: 'seed' is the same in all rows"),
        ('[{"name": ""}]', 'item 1: "name"'),
        ('[{"rule": "bp"}, {"rule": "bp"}]', "2 rows are called 'rule bp'"),
        ("[" * 5000, "not a grid"),
    ],
)
def test_another_file_is_refused(tmp_path, text, words):
    file = tmp_path / "grid.py"
    file.write_text(text)
    with pytest.raises(UserError, match="is not a grid of settings") as error:
        read_grid(file, shared=SMALL)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_costs_are_ratios_to_backpropagation_and_measured_once(tmp_path, monkeypatch):
    rows = {"bp": replace(SMALL, rule="bp"), "blocks": replace(SMALL, blocks=2, head="linear")}
    threads = torch.get_num_threads()
    found = costs(rows, file=tmp_path / "costs.json")
    torch.set_num_threads(threads)
    assert found["bp"] == Cost(1.0, 1.0, 1.0)
    assert 0.5 < found["blocks"].operations < 1.0  # a gradient less crosses the border than the head costs
    monkeypatch.setattr(costs_module, "measure_all", None)
    assert costs(rows, file=tmp_path / "costs.json") == found
    with pytest.raises(TypeError):
        costs({**rows, "blocks": replace(SMALL, blocks=3)}, file=tmp_path / "costs.json")
    with pytest.raises(UserError, match="compares with backpropagation"):
        costs({"blocks": rows["blocks"]}, file=tmp_path / "other.json")
    (tmp_path / "costs.json").write_text('{"costs": 3}')
    with pytest.raises(UserError, match="holds no costs"):
        costs(rows, file=tmp_path / "costs.json")


def point(time: float, validation: float, together: float = 0.0) -> Point:
    some = Estimate(0.5, None)
    return Point(
        f"{time} {validation}",
        runs=1,
        blocks=2,
        validation=Estimate(validation, None),
        validation_all=Estimate(together, None),
        test=some,
        test_all=some,
        cost=Cost(time, 1.0, 1.0),
    )


def test_the_front_is_what_nothing_beats():
    generator = torch.Generator().manual_seed(0)
    points = [point(*row) for row in torch.rand(40, 3, generator=generator).mul(8).round().div(8).tolist()]
    expected = {
        (a.cost.time, a.best)
        for a in points
        if not any(
            b.cost.time <= a.cost.time and b.best >= a.best and (b.cost.time, b.best) != (a.cost.time, a.best)
            for b in points
        )
    }
    found = [(one.cost.time, one.best) for one in front(points)]
    assert set(found) == expected
    assert len(found) == len(expected)
    assert all(a < b for a, b in pairwise(found))


def test_backpropagation_gets_the_time_of_the_others():
    rows = [
        Row("bp", replace(SMALL, rule="bp", epochs=10)),
        *(Row(f"{t}", replace(SMALL, epochs=10)) for t in range(4)),
    ]
    times = {"bp": 1.0, "0": 0.8, "1": 1.32, "2": 1.34, "3": 2.0}
    more, found = with_equal_time(rows, {name: Cost(time, 1.1, 0.5) for name, time in times.items()})
    assert [(row.name, row.settings.epochs) for row in more[5:]] == [("bp, 13 epochs", 13), ("bp, 20 epochs", 20)]
    assert more[5].settings.rule == "bp"
    longer = found["bp, 13 epochs"]
    assert (longer.time, longer.operations, longer.memory) == pytest.approx((1.3, 1.1 * 1.3, 0.5))


def test_a_study_from_its_grid_to_its_picture(tmp_path, capsys):
    (tmp_path / "grid.py").write_text(GRID)
    out = tmp_path / "study"
    args = ["study", str(tmp_path / "grid.py"), "--model=mlp", "--train-size=256", "--validation=64", "--test-size=100"]
    args += ["--epochs=1", "--seeds=1", "--no-equal-time", "--threads=1", f"--out={out}"]
    background = [sys.executable, "-m", "blocklocal", *args, "--background"]
    left = subprocess.run(background, capture_output=True, text=True)
    log = out / "study.log"
    assert str(log) in left.stdout, left.stderr
    deadline = time.monotonic() + 300
    while '"missing": 0' not in log.read_text():
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.1)
    while is_held(out):
        time.sleep(0.05)
    assert main([*args, "--show"]) == 0
    bp, blocks = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert (bp["name"], bp["blocks"], blocks["name"], blocks["blocks"]) == ("rule bp", 1, "two blocks", 2)
    record = json.loads((out / "two_blocks-seed0" / "metrics.jsonl").read_text().splitlines()[-1])
    assert blocks["validation_all"] == {"mean": record["validation_accuracy_all"], "error": None}
    assert blocks["test"]["mean"] == record["test_accuracy"][-1]
    assert "two blocks" in (out / "study.svg").read_text()
    assert (out / "study.png").stat().st_size > 10000


def test_a_study_needs_images_that_are_held_out(tmp_path, capsys):
    (tmp_path / "grid.py").write_text(GRID)
    assert main(["study", str(tmp_path / "grid.py"), f"--out={tmp_path / 'study'}"]) == 2
    assert "--validation" in capsys.readouterr().err
    assert not (tmp_path / "study").exists()


def test_every_change_of_a_loss_is_a_setting() -> None:
    assert sorted(CHANGES) == sorted(field.name for field in fields(Changes))
    assert all(getattr(Changes, name) == getattr(Settings, name) for name in CHANGES)


def test_a_grid_may_vary_the_statistic(tmp_path):
    (tmp_path / "grid.py").write_text('[{"statistic": "moments"}, {"rule": "bp"}]')
    rows = read_grid(tmp_path / "grid.py", shared=SMALL)
    assert [(row.name, row.settings.statistic) for row in rows] == [
        ("statistic moments", "moments"),
        ("rule bp", "mean"),
    ]
    (tmp_path / "grid.py").write_text('[{"statistic": "max"}]')
    with pytest.raises(UserError, match="statistic"):
        read_grid(tmp_path / "grid.py", shared=SMALL)
