"""Series of runs and what they say together: `bll compare` and `bll table1`."""

import fcntl
import json
import os
import signal
import stat
import subprocess
import sys
import time
import warnings
from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console
from run_folders import write_run

from blocklocal.lab import cli
from blocklocal.lab.commands.table1 import Options
from blocklocal.lab.errors import UserError
from blocklocal.lab.models import build
from blocklocal.lab.models.resnet import Bottleneck
from blocklocal.lab.report.seed_groups import gather
from blocklocal.lab.report.table import summarise
from blocklocal.lab.runs.history import read
from blocklocal.lab.settings import Settings, encode
from blocklocal.lab.sweeps.sweep import arguments, complete
from blocklocal.lab.sweeps.table1 import DATASETS, PAPER, RULES, SCALES
from blocklocal.lab.training.recipes import recipe, settings_from

SMALL = ["--model=mlp", "--train-size=256", "--test-size=100"]

# Stands in for the Python that runs `bll train`: writes the folder of a finished run, or fails for one rule.
TRAINER = """#!{python}
import json, pathlib, sys
out = pathlib.Path(sys.argv[sys.argv.index("--out") + 1])
out.mkdir(parents=True, exist_ok=True)
with (out / "calls").open("a") as file:
    print(*sys.argv[1:], file=file)
settings = {settings}[str(out)]
facts = {{"data": {{}}, "parameters": 1, "blocks": 1, "steps": 1, "processes": 1, "git": None}}
facts |= {{"versions": {{}}, "device": {{}}}}
(out / "config.json").write_text(json.dumps({{"settings": settings, **facts}}))
if settings["rule"] == {failing!r}:
    sys.exit(2)
record = {{"epoch": 1, "train_loss": [1.0], "test_accuracy": [0.5], "test_accuracy_all": 0.5, "borders": []}}
record |= {{"seconds": 1.0, "peak_memory_mib": 1.0}}
(out / "metrics.jsonl").write_text(json.dumps(record) + "\\n")
(out / "model.safetensors").touch()
"""


@pytest.fixture
def pretend(tmp_path, monkeypatch):
    """pretend(runs): from now on they are not trained, but their folders are written."""

    def install(runs, *, failing=None):
        script = tmp_path / "trainer"
        settings = {str(run.folder): encode(run) for run in runs}
        script.write_text(TRAINER.format(python=sys.executable, settings=settings, failing=failing))
        script.chmod(script.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setattr(sys, "executable", str(script))

    return install


def series(folder, *, rules=("bp", "bll")):
    return [replace(recipe("digits"), rule=rule, epochs=1, out=str(folder / f"{rule}-seed0")) for rule in rules]


def calls(folder):
    return (folder / "calls").read_text().splitlines()


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("data", DATASETS)
def test_train_reads_the_arguments_as_the_settings_they_were(scale, data):
    settings = replace(SCALES[scale](data, rule="fa"), seed=3, out="somewhere")
    assert settings_from(arguments(settings)) == settings


def test_what_a_recipe_switches_on_is_switched_off():
    settings = Settings(data="cifar10", flip=False, label_smoothing=0.1, dtype="bf16", threads=1, channels_last=True)
    assert settings_from(arguments(settings)) == settings


@pytest.mark.parametrize("scale", SCALES)
def test_cells_of_a_scale_differ_in_rule_and_data_alone(scale):
    cells = [SCALES[scale](data, rule=rule) for data in DATASETS for rule in RULES]
    assert len({replace(cell, data="", rule="bp") for cell in cells}) == 1
    assert {(cell.data, cell.rule) for cell in cells} >= set(PAPER)
    for cell in cells:
        cell.check()


def test_blocks_of_the_paper_have_four_bottlenecks_each():
    cell = SCALES["paper"]("cifar10", rule="bll")
    model = build(cell.model, channels=3, size=(32, 32), classes=10)
    names = [name for name, module in model.named_modules() if isinstance(module, Bottleneck)]
    assert [names.index(name) + 1 for name in cell.at] == [4, 8, 12]
    assert len(names) == 16


@pytest.mark.parametrize("scale", ["small", "tiny"])
def test_small_scales_are_cut_into_four_blocks(scale):
    cell = SCALES[scale]("cifar10", rule="bll")
    names = [name for name, _ in build(cell.model, channels=3, size=(32, 32), classes=10).named_modules()]
    positions = [names.index(name) for name in cell.at]
    assert positions == sorted(positions)
    assert len(positions) == 3


def test_table_begins_with_all_cells_of_the_first_seed():
    runs = Options(scale="tiny", seeds=2, epochs=7, data="images").sweep
    assert [run.seed for run in runs] == [0] * 15 + [1] * 15
    assert len({run.out for run in runs}) == 30
    assert {run.data for run in runs} == {f"images/{name}" for name in DATASETS}
    assert {run.epochs for run in runs} == {7}


def test_numbers_of_a_row(tmp_path):
    from scipy.stats import ttest_ind  # which takes a second to import

    bp, bll = [0.91, 0.93, 0.925], [0.90, 0.94]
    for seed, accuracy in enumerate(bp):
        write_run(tmp_path / f"bp{seed}", rule="bp", seed=seed, accuracies=[0.5, accuracy], blocks=1)
    for seed, accuracy in enumerate(bll):
        write_run(tmp_path / f"bll{seed}", seed=seed, accuracies=[0.5, accuracy], at=["layer1"])
    write_run(tmp_path / "slow", rule="pred", accuracies=[0.5, 0.6], lr=0.01)
    write_run(tmp_path / "half", rule="fa", accuracies=[0.4], epochs=2)
    whole, local, unlike, half = summarise(
        gather([read(path) for path in sorted(tmp_path.iterdir(), key=lambda p: ("bp bl sl ha".find(p.name[:2]), p))]),
        reference=PAPER,
    )
    assert local.results["accuracy"].mean == pytest.approx(np.mean(bll))
    assert local.results["accuracy"].std == pytest.approx(np.std(bll, ddof=1))
    assert local.results["accuracy"].all_mean == pytest.approx(np.mean(bll) + 0.01)
    welch = np.asarray(ttest_ind(bll, bp, equal_var=False))[0]
    assert local.results["accuracy"].to_bp == pytest.approx(np.mean(bll) - np.mean(bp))
    assert local.results["accuracy"].stderr == pytest.approx((np.mean(bll) - np.mean(bp)) / welch)
    assert (local.runs, local.seeds, local.blocks, local.epochs) == (2, (0, 1), 4, 2)
    assert (local.seconds, local.peak_memory_mib) == (23.0, 302.0)
    assert local.paper == (0.946, 0.0017)
    assert whole.results["accuracy"].to_bp is None
    assert unlike.results["accuracy"].to_bp is None, "its learning rate is not that of the runs of bp"
    assert (half.epochs, half.epochs_planned, half.results["accuracy"].std) == (1, 2, None)


def test_row_of_a_group_counts_finished_runs_where_there_are_some(tmp_path):
    write_run(tmp_path / "a", accuracies=[0.3, 0.8])
    write_run(tmp_path / "b", seed=1, accuracies=[0.2], epochs=2)
    (row,) = summarise(gather([read(tmp_path / "a"), read(tmp_path / "b")]))
    assert (row.results["accuracy"].mean, row.runs, row.runs_planned) == (0.8, 1, 2)


def test_runs_of_one_seed_are_one_sample(tmp_path, capsys):
    """Of two, the finished one counts, and of two finished ones the later; the other is named."""
    for name, seed, accuracy in [("old", 0, 0.7), ("new", 0, 0.8), ("other", 1, 0.9)]:
        write_run(tmp_path / name, seed=seed, accuracies=[0.5, accuracy])
    write_run(tmp_path / "late", accuracies=[0.6], epochs=2)
    for name, seconds in [("new", 2000), ("old", 1000), ("late", 3000)]:
        os.utime(tmp_path / name / "metrics.jsonl", (seconds, seconds))
    with pytest.warns(UserWarning, match="is left out") as said:
        (row,) = summarise(gather([read(path) for path in sorted(tmp_path.iterdir())]))
    assert (row.runs, row.runs_planned, row.seeds) == (2, 2, (0, 1))
    assert row.results["accuracy"].mean == pytest.approx(0.85)
    assert row.results["accuracy"].std == pytest.approx(np.std([0.8, 0.9], ddof=1))
    kept = f"'{tmp_path / 'new'}' has the same settings and the same seed"
    assert [str(warning.message) for warning in said] == [
        f"'{tmp_path / name}' is left out: {kept}" for name in ("late", "old")
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        assert cli.main(["report", str(tmp_path), f"--out={tmp_path / 'report'}"]) == 0
    out, err = capsys.readouterr()
    assert err.count("bll: warning: ") == err.count("is left out") == err.count("\n") == 2
    assert "(2 runs)" in (tmp_path / "report" / "report.md").read_text().splitlines()[0]
    assert "unfinished" not in out.splitlines()[-2]


def test_a_run_that_is_named_twice_is_one(tmp_path, capsys, monkeypatch):
    write_run(tmp_path / "run", accuracies=[0.5])
    (tmp_path / "link").symlink_to("run")
    monkeypatch.chdir(tmp_path)
    assert cli.main(["report", "run", "./run/", str(tmp_path / "run"), "link", "--out=report"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out.splitlines()[-1])["runs"] == 1
    assert err == ""


def test_runs_of_one_group_have_the_same_blocks(tmp_path):
    for seed, blocks in enumerate((4, 2)):
        write_run(tmp_path / str(seed), seed=seed, accuracies=[0.5], blocks=blocks)
    with pytest.raises(UserError, match="have the same settings, but 4 and 2 blocks"):
        gather([read(tmp_path / "0"), read(tmp_path / "1")])


def test_groups_of_one_rule_are_told_apart(tmp_path):
    for blocks in (2, 4, 8):
        write_run(tmp_path / str(blocks), accuracies=[0.5], blocks=blocks, lr=0.1 * blocks)
    groups = gather([read(path) for path in sorted(tmp_path.iterdir())])
    assert [group.label for group in groups] == ["bll, lr 0.2", "bll, lr 0.4", "bll, lr 0.8"]


def test_finished_runs_are_left_alone(tmp_path, pretend, capsys):
    runs, console = series(tmp_path), Console(stderr=True)
    pretend(runs)
    assert [run.settings.rule for run in complete(runs, folder=tmp_path, console=console)] == ["bp", "bll"]
    (runs[0].folder / "model.safetensors").unlink()
    assert len(complete(runs, folder=tmp_path, console=console)) == 2
    first, again = calls(runs[0].folder)
    assert again == f"{first} --resume"
    assert len(calls(runs[1].folder)) == 1
    assert "bll-seed0, done before" in capsys.readouterr().err.replace("\n", "")


def test_failed_run_does_not_stop_the_others(tmp_path, pretend, capsys):
    pretend(series(tmp_path, rules=("bp", "bll", "pred")), failing="bp")
    command = ["compare", "digits", "--rules=bp,bll,pred", "--epochs=1", "--seeds=1", f"--out={tmp_path}"]
    assert cli.main(command) == 2
    out, err = capsys.readouterr()
    assert [row["rule"] for row in json.loads(out.splitlines()[-1])["rows"]] == ["bll", "pred"]
    assert "1 of 3 runs failed" in err
    assert "bp-seed0" in err


def test_a_first_run_that_cannot_begin_is_one_line_and_leaves_nothing(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["compare", "nowhere", "--rules=bp,bll"]) == 2
    out, err = capfd.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith("bll: the run in 'runs/compare-nowhere-resnet18/bp-seed0' could not begin: unknown data")
    assert not list(tmp_path.iterdir())


def test_run_that_cannot_begin_stops_the_series(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", "false")
    with pytest.raises(UserError, match="could not begin"):
        complete(series(tmp_path), folder=tmp_path, console=Console(stderr=True))


def test_series_waits_for_a_process_that_a_killed_one_left(tmp_path, pretend, capsys):
    runs = series(tmp_path)
    pretend(runs)
    runs[0].folder.mkdir()
    with (runs[0].folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        left = subprocess.Popen(["sleep", "0.5"], pass_fds=[lock.fileno()])
    complete(runs, folder=tmp_path, console=Console(stderr=True))
    assert left.poll() == 0
    assert "waiting for another process" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--rules=bp,backprop"], "unknown rule 'backprop'"),
        (["--rules=bp,bp"], "--rules 'bp,bp': name each once"),
        (["--rules="], "--rules=: the value is empty"),
        (["--seeds=0"], "--seeds 0 is out of range"),
        (["--epochs=2"], "holds a run with other settings (--epochs)"),
        (["--rule=bp"], "--rule"),
    ],
)
def test_unusable_arguments(tmp_path, pretend, capsys, options, complaint):
    command = {"--seeds": "1", "--epochs": "1", "--out": str(tmp_path)}
    pretend(series(tmp_path))
    assert cli.main(["compare", "digits", *(f"{name}={value}" for name, value in command.items())]) == 0
    capsys.readouterr()
    command |= dict(option.split("=") for option in options)
    assert cli.main(["compare", "digits", *(f"{name}={value}" for name, value in command.items())]) == 2
    assert complaint in capsys.readouterr().err


def test_two_rules_on_the_digits(tmp_path, capsys):
    command = ["compare", "digits", *SMALL, "--rules=bp,bll", "--seeds=1", "--epochs=1", f"--out={tmp_path}/runs"]
    assert cli.main(command) == 0
    out = capsys.readouterr().out
    rows = json.loads(out.splitlines()[-1])["rows"]
    for row, rule, blocks in zip(rows, ["bp", "bll"], [1, 4], strict=True):
        record = json.loads((tmp_path / "runs" / f"{rule}-seed0" / "metrics.jsonl").read_text())
        assert (row["dataset"], row["rule"], row["blocks"], row["runs"]) == ("digits", rule, blocks, 1)
        assert row["accuracy_mean"] == record["test_accuracy"][-1]
        assert (row["accuracy_std"], row["difference_stderr"]) == (None, None)
        assert (row["seconds"], row["peak_memory_mib"]) == (record["seconds"], record["peak_memory_mib"])
        assert f"{100 * row['accuracy_mean']:.2f}" in out
    assert rows[1]["difference_to_bp"] == rows[1]["accuracy_mean"] - rows[0]["accuracy_mean"]


def test_killed_series_goes_on_where_it_was(tmp_path, capsys):
    epochs = 30
    command = ["compare", "digits", *SMALL, "--rules=bp", "--seeds=1", f"--epochs={epochs}", f"--out={tmp_path}/runs"]
    metrics = tmp_path / "runs" / "bp-seed0" / "metrics.jsonl"
    process = subprocess.Popen(
        [sys.executable, "-m", "blocklocal", *command], start_new_session=True, stderr=subprocess.DEVNULL
    )
    while not (metrics.exists() and metrics.read_text().count("\n")):
        assert process.poll() is None
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    before = [json.loads(line) for line in metrics.read_text().split("\n")[:-1]]
    assert len(before) < epochs
    assert cli.main(command) == 0
    after = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert [record["epoch"] for record in after] == list(range(1, epochs + 1))
    assert after[: len(before) - 1] == before[:-1], "the last one may have come before its checkpoint"
    (row,) = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert row["accuracy_mean"] == after[-1]["test_accuracy"][-1]
