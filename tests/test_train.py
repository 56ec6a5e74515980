"""Training runs: against plain PyTorch, against themselves after a kill, and what they leave in their folder."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from interruption import interrupted
from run_folders import FACTS
from safetensors.torch import load_file
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim import SGD
from torch.optim.lr_scheduler import CosineAnnealingLR

from blocklocal import BlockLocal, SpatialGrid, SpatialMoments, spatial_mean
from blocklocal.lab.cli import main
from blocklocal.lab.errors import UserError
from blocklocal.lab.models import build
from blocklocal.lab.runs.checkpoint_part import Part
from blocklocal.lab.runs.checkpoints import Checkpoints
from blocklocal.lab.runs.folder import Run
from blocklocal.lab.settings import Settings, encode
from blocklocal.lab.tasks.measure import ACCURACY
from blocklocal.lab.training.experiment import prepare
from blocklocal.lab.training.optim import SCHEDULES, cosine, onecycle
from blocklocal.lab.training.recipes import DIGITS, recipe, settings_from
from blocklocal.lab.training.rules import RULES
from blocklocal.lab.training.run import train
from blocklocal.lab.training.trained import load_tested
from blocklocal.lab.training.trainer import SingleTrainer

TINY = Settings(model="mlp", epochs=3, train_size=256, test_size=100, threads=1)

NETS = '''
import torch
from torch import nn


def dropout(*, channels, size, classes):
    """Draws from the global random state at every step."""
    n = channels * size[0] * size[1]
    return nn.Sequential(nn.Flatten(), nn.Linear(n, 64), nn.ReLU(), nn.Dropout(0.3), nn.Linear(64, classes))


class Fuse(nn.Module):
    """Gives nan from its sixth training step on."""

    def __init__(self):
        super().__init__()
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, x):
        if self.training:
            self.steps += 1
        return x * torch.where(self.steps > 5, torch.nan, 1.0)


def fuse(*, channels, size, classes):
    n = channels * size[0] * size[1]
    return nn.Sequential(nn.Flatten(), nn.Linear(n, 16), nn.ReLU(), nn.Linear(16, 16), Fuse(), nn.Linear(16, classes))
'''


@pytest.fixture
def own_nets(tmp_path, monkeypatch):
    (tmp_path / "nets").mkdir()
    (tmp_path / "nets" / "own_nets.py").write_text(NETS)
    monkeypatch.syspath_prepend(tmp_path / "nets")
    yield
    sys.modules.pop("own_nets", None)


def lines(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_backpropagation_is_plain_pytorch_bit_for_bit(tmp_path):
    settings = replace(TINY, model="cnn", rule="bp", epochs=5, warmup=0.0, out=str(tmp_path / "bp"))
    summary = train(settings)
    experiment = prepare(settings)
    torch.manual_seed(settings.seed)
    model = build("cnn", channels=1, size=(8, 8), classes=10)
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True)
    steps = [batch for epoch in range(1, settings.epochs + 1) for batch in experiment.training_batches(epoch)]
    for step, (x, y) in enumerate(steps):
        optimizer.param_groups[0]["lr"] = 0.1 * cosine(step, 0, len(steps))
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        optimizer.step()
    trained = load_file(tmp_path / "bp" / "model.safetensors")
    assert trained.keys() == model.state_dict().keys()
    assert all(torch.equal(trained[name], value) for name, value in model.state_dict().items())

    model.load_state_dict(trained)
    with torch.no_grad():
        test = experiment.dataset.test
        predicted = model.eval()(experiment.task.prepared(test.inputs)).argmax(1)
    assert summary["accuracy"] == (predicted == test.labels).double().mean().item()


def test_a_run_leaves_its_folder(tmp_path):
    settings = replace(TINY, out=str(tmp_path / "run"))
    summary = train(settings)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        "checkpoint",
        "config.json",
        "metrics.jsonl",
        "model.safetensors",
    ]
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert Run(tmp_path / "run").settings() == replace(settings, out=None)
    assert {"versions", "device", "git", "data"} <= config.keys()
    records = lines(tmp_path / "run")
    assert [record["epoch"] for record in records] == [1, 2, 3]
    for record in records:
        assert len(record["train_loss"]) == len(record["test_accuracy"]) == summary["blocks"] == 4
        assert [{*border} >= {"agreement", "variance_ratio"} for border in record["borders"]] == [True] * 3
        assert record["peak_memory_mib"] > 0
    assert summary["rule"] == "bll"
    assert summary["accuracy"] == records[-1]["test_accuracy"][-1]
    assert summary["seconds"] == pytest.approx(sum(record["seconds"] for record in records), abs=1e-3)
    assert Path(summary["out"]) == tmp_path / "run"
    assert records[-1]["train_loss"][-1] < records[0]["train_loss"][-1]


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_trains(tmp_path, rule):
    train(replace(TINY, model="cnn", rule=rule, train_size=512, batch_size=16, warmup=0.0, out=str(tmp_path)))
    first, *_, last = lines(tmp_path)
    assert last["train_loss"][-1] < first["train_loss"][-1]
    assert last["test_accuracy"][-1] > 0.5  # of ten classes
    aligned = {"fa", "usf", "brsf", "frsf", "dfa", "drtp"}
    angles = last.get("angles", {})
    assert bool(angles) == (rule in aligned)
    assert all(0 <= degrees <= 180 for degrees in angles.values())


@pytest.mark.parametrize(
    ("name", "statistic"), [("mean", spatial_mean), ("moments", SpatialMoments()), ("grid", SpatialGrid(2))]
)
def test_the_statistic_of_a_run_is_that_of_its_borders(tmp_path, name, statistic):
    """The losses of a learner that is built without the settings."""
    settings = replace(TINY, model="cnn", blocks=2, epochs=1, statistic=name, out=str(tmp_path / "run"))
    train(settings)
    experiment = prepare(settings)
    learner = BlockLocal(
        build("cnn", channels=1, size=(8, 8), classes=10),
        blocks=2,
        classes=10,
        example=experiment.sample,
        statistic=statistic,
    )
    learner.load_state_dict(experiment.learner.state_dict())
    x, y = next(experiment.training_batches(1))
    assert torch.equal(learner(x, y)[0], experiment.learner(x, y)[0])
    assert lines(tmp_path / "run")[0]["train_loss"][0] > 0
    assert Run(tmp_path / "run").settings().statistic == name


def test_a_killed_run_resumes_bit_for_bit(tmp_path):
    settings = replace(TINY, model="cnn", epochs=4)
    train(replace(settings, out=str(tmp_path / "whole")))
    stored = encode(settings)
    options = [f"--{name.replace('_', '-')}={stored[name]}" for name in ("model", "epochs", "train_size", "threads")]
    command = [sys.executable, "-m", "blocklocal", "train", *options, "--test-size=100", f"--out={tmp_path / 'killed'}"]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    metrics = tmp_path / "killed" / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and metrics.read_text().count("\n") >= 2):
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "killed" / "model.safetensors").exists()

    train(settings_from(["--resume", f"--out={tmp_path / 'killed'}"]))
    whole, resumed = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "killed"))
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert [record["epoch"] for record in lines(tmp_path / "killed")] == [1, 2, 3, 4]


RANDOM = [
    {"model": "own_nets:dropout", "blocks": 2},
    {"model": "cnn", "rule": "brsf"},
    {"model": "resnet8", "blocks": 2, "lookahead": "frozen", "refresh": 3},
    {"model": "mlp", "blocks": 2, "head": "unembedding", "refresh": 3},
    *({"model": "cnn", "blocks": 2, "statistic": name} for name in ("moments", "grid")),
    *({"rule": rule, "seed": 3} for rule in ("fa", "usf", "frsf", "dfa", "drtp")),
]


@pytest.mark.parametrize("changes", RANDOM)
def test_resuming_restores_what_is_random(tmp_path, own_nets, changes):
    settings = replace(TINY, epochs=2, save_every=2, **changes)
    train(replace(settings, out=str(tmp_path / "whole")))
    for step, kept in ((0, "epoch 1$"), (3, "epoch 2, step 2 of 4")):
        stopped = tmp_path / f"stopped{step}"
        with interrupted(SingleTrainer, epoch=2, step=step), pytest.raises(KeyboardInterrupt, match=kept):
            train(replace(settings, out=str(stopped)))
        torch.manual_seed(99)
        train(replace(settings, out=str(stopped), resume=True))
        whole, resumed = (load_file(out / "model.safetensors") for out in (tmp_path / "whole", stopped))
        assert all(torch.equal(whole[name], resumed[name]) for name in whole)
        for one, other in zip(lines(tmp_path / "whole"), lines(stopped), strict=True):
            assert one["train_loss"] == other["train_loss"], "the mean over the epoch, before and after the stop"
            assert one["borders"] == other["borders"]


def test_resuming_mends_metrics_that_ran_ahead_of_the_checkpoint(tmp_path):
    settings = replace(TINY, out=str(tmp_path))
    with interrupted(SingleTrainer, epoch=2), pytest.raises(KeyboardInterrupt):
        train(settings)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({**lines(tmp_path)[0], "epoch": 2}) + "\n" + '{"epoch": 3, "train')
    half = tmp_path / "checkpoint" / "step-8" / "block-0"
    half.mkdir(parents=True)
    (half / "index.json").write_bytes(b"one block of four")
    train(replace(settings, resume=True))
    assert [record["epoch"] for record in lines(tmp_path)] == [1, 2, 3]


def test_a_run_stopped_before_its_first_checkpoint_begins_anew(tmp_path):
    with interrupted(SingleTrainer, epoch=1), pytest.raises(KeyboardInterrupt, match="no checkpoint"):
        train(replace(TINY, out=str(tmp_path)))
    train(replace(TINY, out=str(tmp_path), resume=True))
    assert [record["epoch"] for record in lines(tmp_path)] == [1, 2, 3]


@pytest.mark.parametrize(("epochs", "said"), [(2, None), (3, "no whole checkpoint, though the run has done epochs")])
def test_a_run_killed_while_its_first_checkpoint_was_written(tmp_path, epochs, said, monkeypatch):
    """It is written while the second epoch trains, which is recorded before it is whole; the third is not."""
    settings = replace(TINY, out=str(tmp_path), epochs=4)
    with monkeypatch.context() as slow, interrupted(SingleTrainer, epoch=epochs + 1):
        slow.setattr(Checkpoints, "save", lambda *_, **__: None)
        with pytest.raises(KeyboardInterrupt):
            train(settings)
    assert len(lines(tmp_path)) == epochs
    if said is None:
        train(replace(settings, resume=True))
        assert [record["epoch"] for record in lines(tmp_path)] == [1, 2, 3, 4]
    else:
        with pytest.raises(UserError, match=said):
            train(replace(settings, resume=True))


def test_a_finished_run_stays_as_it_is(tmp_path, capsys):
    settings = replace(TINY, out=str(tmp_path))
    summary = train(settings)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match="already holds a run"):
        train(settings)
    assert {path: path.read_bytes() for path in before} == before
    (tmp_path / "model.safetensors").unlink()
    assert train(replace(settings, resume=True)) == summary
    assert "nothing is left" in " ".join(capsys.readouterr().err.split())
    assert {path: path.read_bytes() for path in before} == before


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("finished") / "run"
    train(replace(TINY, rule="brsf", epochs=1, out=str(out)))
    return out


def flip(part: Part) -> None:
    file = part.path / "tensors.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 4
    file.write_bytes(content)


def put(**entries: object) -> Callable[[Part], object]:
    """Write it again, sound, with something else in it."""
    changes = {name.replace("__", "."): value for name, value in entries.items()}

    def change(part: Part) -> None:
        state = {
            name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in part.read().items()
        }
        part.write({name: value for name, value in {**state, **changes}.items() if value is not None})

    return change


@pytest.mark.parametrize(
    ("change", "words", "testing"),
    [
        (flip, r"block-0' is not a readable checkpoint \(tensors\.safetensors is not", True),
        (lambda part: (part.path / "index.json").write_text("{}"), r"\(index\.json: format nothing", True),
        (
            lambda part: (part.path / "index.json").rename(part.path / ".metadata"),
            "older version.*blocklocal 0.1",
            True,
        ),
        (put(blocks__0__more=torch.zeros(3)), r"unknown: blocks\.0\.more", True),
        (put(progress__losses=None), "does not fit.*losses of 0 steps", False),
        (put(progress__losses=torch.zeros(2)), "does not fit.*losses of 0 steps", False),
        (put(progress__seconds="1.5"), "does not fit.*their time", False),
        (put(random__cpu=torch.zeros(7)), "does not fit", False),
        (put(random__cpu=torch.zeros(7, dtype=torch.uint8)), "does not fit", False),
        (put(alignment__rule=None), "does not fit.*rule without a name", False),
        (put(alignment__next_seed=None), "does not fit.*next_seed", False),
        (put(alignment__feedback__more=torch.zeros(2)), "does not fit.*feedback of more", False),
    ],
)
def test_a_checkpoint_that_is_damaged_or_foreign_is_one_line(tmp_path, finished, capsys, change, words, testing):
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    half = Part(out / "checkpoint" / "step-9" / "block-0", 9, 0)  # a kill has left it
    half.path.mkdir(parents=True)
    change(Part(out / "checkpoint" / "step-4" / "block-0", 4, 0))
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    for args in (["train", "--resume", f"--out={out}"], ["eval", str(out)]):
        if args[0] == "train" or testing:
            assert main(args) == 2
            printed = capsys.readouterr()
            assert printed.out == ""
            assert re.fullmatch(f"bll: .*{words}.*\n", printed.err)
        assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
        assert half.path.exists()


def test_a_loss_that_is_no_number_is_named_and_the_checkpoint_kept(tmp_path, own_nets):
    at = ("1", "3")
    settings = replace(TINY, model="own_nets:fuse", at=at, out=str(tmp_path))
    with pytest.raises(UserError, match=r"block 2 is nan at step 2 of epoch 2.*--lr.*checkpoint of epoch 1"):
        train(settings)
    assert len(lines(tmp_path)) == 1


def test_options_come_from_the_recipe_or_from_the_run(tmp_path):
    assert settings_from([]) == DIGITS
    assert settings_from(["cifar10", "--lr", "0.5"]) == replace(recipe("cifar10"), lr=0.5)
    stored = replace(recipe("cifar10"), seed=7, at=("layer1",), compile=True)
    run = Run(tmp_path)
    run.create(stored, facts=FACTS)
    place = [f"--out={tmp_path}", "--resume"]
    assert settings_from(place) == replace(stored, out=str(tmp_path), resume=True)
    assert settings_from([*place, "cifar10", "--seed=7"]) == settings_from(place)
    with pytest.raises(UserError, match="--lr, --seed differs"):
        settings_from([*place, "--lr=3", "--seed=8"])
    with pytest.raises(UserError, match=r"^'[^']*' holds no run"):
        settings_from([f"--out={tmp_path / 'other'}", "--resume"])
    for content in ('{"settings": {"speed": 3}}', "{"):
        run.config.write_text(content)
        with pytest.raises(UserError, match="not a configuration"):
            settings_from(place)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rule": "hebb"}, "unknown rule 'hebb'.*bll-paper"),
        ({"model": "resnet19"}, "unknown model"),
        ({"data": "digit"}, "unknown data"),
        ({"at": ("layer9",)}, "layer9"),
        ({"blocks": 40}, "blocks=40"),
        ({"device": "cuda:77"}, "--device 'cuda:77'"),
        ({"batch_size": 2000}, "--batch-size 2000"),
        ({"crop": 8}, "--crop 8"),
        ({"lr": float("nan")}, "--lr nan"),
        ({"epochs": 0}, "--epochs 0"),
        ({"train_size": 9999}, "9999"),
    ],
)
def test_unusable_settings_leave_no_folder(tmp_path, changes, words):
    with pytest.raises(UserError, match=words):
        train(replace(TINY, out=str(tmp_path / "run"), **changes))
    assert not (tmp_path / "run").exists()


def test_exits_are_the_learners(tmp_path):
    settings = replace(TINY, model="cnn", out=str(tmp_path))
    train(settings)
    experiment = prepare(settings)
    checkpoints = Checkpoints(Run(tmp_path).checkpoints, blocks=4)
    load_tested(experiment, checkpoints, minibatch=3 * experiment.steps, blocks=range(4))
    exits, learner, test = experiment.test(), experiment.learner.eval(), experiment.dataset.test
    x = experiment.task.prepared(test.inputs)

    def accuracy(logits: torch.Tensor) -> float:
        return (logits.argmax(1) == test.labels).double().mean().item()

    assert exits.values(ACCURACY) == [accuracy(learner.predict(x, exit=k)) for k in range(4)]
    assert exits.combined_value(ACCURACY) == accuracy(learner.predict(x, exit="all"))
    for threshold in (0.3, 0.8, 1.0):
        assert exits.early_value(ACCURACY, threshold) == accuracy(learner.predict(x, confidence=threshold))
    assert exits.leaving(1.1).tolist() == [3] * len(test)


@pytest.mark.parametrize("name", SCHEDULES)
def test_learning_rates_rise_to_one_and_stay_between(name):
    rates = [SCHEDULES[name](step, 20, 200) for step in range(200)]
    peak = rates.index(max(rates))
    assert max(rates) == pytest.approx(1, abs=0.02)
    assert min(rates) > 0
    assert rates[: peak + 1] == sorted(rates[: peak + 1])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)


def test_the_cosine_is_pytorchs():
    optimizer = SGD([nn.Parameter(torch.zeros(()))], lr=1.0)
    schedule = CosineAnnealingLR(optimizer, T_max=200)
    for step in range(200):
        assert cosine(step, 0, 200) == pytest.approx(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()


def test_schedules_end_at_zero():
    assert cosine(200, 20, 200) == pytest.approx(0)
    assert onecycle(200, 20, 200) == pytest.approx(0)
