"""A block that is trained alone on stored activations, against the same block among all others."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from block_folders import options, settings_of, train_chain
from interruption import interrupted
from safetensors.torch import load_file

from blocklocal.lab.cli import main
from blocklocal.lab.one_block.activations import Activations
from blocklocal.lab.one_block.alone import prepare_alone
from blocklocal.lab.one_block.folder import BlockRun
from blocklocal.lab.one_block.trainer import BlockTrainer
from blocklocal.lab.runs.block_state import block_state
from blocklocal.lab.settings import Settings
from blocklocal.lab.tasks.find import load_task
from blocklocal.lab.tasks.outline import task_without_data
from blocklocal.lab.training.experiment import Experiment, prepare
from blocklocal.lab.training.optim import averaged, set_rate
from blocklocal.lab.training.run import train

KINDS = ("images", "text", "table")

NETS = '''
from torch import nn


def dropout(*, channels, size, classes):
    """Its second block draws from the global random state at every step."""
    n = channels * size[0] * size[1]
    first = nn.Sequential(nn.Flatten(), nn.Linear(n, 24), nn.BatchNorm1d(24), nn.ReLU())
    return nn.Sequential(first, nn.Sequential(nn.Linear(24, 16), nn.Dropout(0.3)), nn.Linear(16, classes))
'''


@pytest.fixture(autouse=True)
def own_nets(tmp_path, monkeypatch):
    (tmp_path / "nets").mkdir()
    (tmp_path / "nets" / "block_nets.py").write_text(NETS)
    monkeypatch.syspath_prepend(tmp_path / "nets")
    yield
    sys.modules.pop("block_nets", None)


def lines(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def assert_same(found: dict[str, torch.Tensor], expected: dict) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def behind_frozen(settings: Settings, k: int, before: list[BlockRun]) -> Experiment:
    """Block k trained by `BlockLocal.backward` in a whole model, whose blocks before it are frozen."""
    experiment = prepare(settings)
    learner = experiment.learner
    learner.load_state_dict({name: t for run in before for name, t in run.weights().items()}, strict=False)
    learner.train()
    for j in range(len(learner.blocks)):
        if j != k:
            for part in (learner.blocks[j], *learner.borders[j : j + 1]):
                part.eval().requires_grad_(False)
    optimizer = experiment.optimizer(learner.block_parameters(k))
    optimizers = [optimizer if j == k else None for j in range(len(learner.blocks))]
    for epoch in range(1, settings.epochs + 1):
        for step, (x, y) in enumerate(experiment.training_batches(epoch)):
            set_rate(optimizer, experiment.learning_rate((epoch - 1) * experiment.steps + step))
            with experiment.autocast():
                learner.backward(x, y, optimizers=optimizers)
    with averaged([optimizer]):
        learner.trained = {name: t.clone() for name, t in block_state(learner, k, None).items()}  # type: ignore
    return experiment


CASES = {
    **{kind: (kind, {}) for kind in KINDS},
    "bf16": ("images", {"dtype": "bf16"}),
    "numbers": ("numbers", {"validation": 60}),
    "schedule-free": ("table", {"optimizer": "schedulefree", "schedule": "constant", "clip": 1.0}),
    "dropout": ("images", {"model": "block_nets:dropout", "at": ("0", "1")}),
    "Pred-Sim": ("images", {"rule": "predsim", "validation": 20}),
}


@pytest.mark.parametrize("case", CASES)
def test_a_block_learns_the_same_as_behind_frozen_ones(tmp_path, case):
    kind, changes = CASES[case]
    settings = replace(settings_of(kind, tmp_path), **changes)
    trust = ["--trust"] if ":" in settings.model else []
    assert main(["train", "--only=0", *options(settings), "--out", str(tmp_path / "b0")]) == 0
    before = []
    for k in (1, 2):
        before.append(BlockRun(tmp_path / f"b{k - 1}"))
        cache = tmp_path / f"c{k - 1}"
        views = ["--views", str(settings.epochs)] if k == 1 else []
        assert main(["cache", str(before[-1].path), "--yes", "--out", str(cache), *views, *trust]) == 0
        assert main(["train", "--only", str(k), "--from", str(cache), "--out", str(tmp_path / f"b{k}"), *trust]) == 0
        experiment = behind_frozen(before[0].settings(), k, before)
        trained = BlockRun(tmp_path / f"b{k}")
        assert_same(trained.weights(), experiment.learner.trained)  # type: ignore[arg-type]
        experiment.learner.load_state_dict(trained.weights(), strict=False)
        exits, last = experiment.test(), lines(trained.path)[-1]
        for measure in experiment.task.grading.measures:
            assert last[f"test_{measure.name}"] == exits.values(measure)[k : k + 1]
        held_out, (judge, *_) = experiment.validate(), experiment.task.grading.measures
        assert last.get(f"validation_{judge.name}") == (held_out and held_out.values(judge)[k : k + 1])


@pytest.mark.parametrize("kind", [*KINDS, "accumulated"])
def test_the_first_block_learns_the_same_as_among_all(tmp_path, kind):
    settings = settings_of("images" if kind == "accumulated" else kind, tmp_path)
    if kind == "accumulated":
        settings = replace(settings, accumulate=2, label_smoothing=0.1, optimizer="adamw", lr=0.01)
    train(replace(settings, out=str(tmp_path / "all")))
    assert main(["train", "--only", "0", *options(settings), "--out", str(tmp_path / "b0")]) == 0
    (step,) = (tmp_path / "all" / "checkpoint").iterdir()
    for name, tensor in load_file(
        tmp_path / "b0" / "checkpoint" / step.name / "block-0" / "tensors.safetensors"
    ).items():
        if not name.startswith("random"):
            assert torch.equal(load_file(step / "block-0" / "tensors.safetensors")[name], tensor), name
    for alone, together in zip(lines(tmp_path / "b0"), lines(tmp_path / "all"), strict=True):
        for value in ("train_loss", "test_accuracy", "test_loss"):
            assert alone[value] == together[value][:1]
        assert alone["border"] == together["borders"][0]


def test_cuts_that_the_library_finds_are_recorded(tmp_path):
    settings = replace(settings_of("images", tmp_path), model="resnet8", at=(), blocks=3, epochs=1)
    assert main(["train", "--only", "0", *options(settings), "--out", str(tmp_path / "b0")]) == 0
    found = BlockRun(tmp_path / "b0").settings()
    blocks = prepare(settings).learner.blocks
    assert len(found.at) == 2
    for own, block in zip(prepare(found).learner.blocks, blocks, strict=True):
        assert [name for name, _ in own.named_parameters()] == [name for name, _ in block.named_parameters()]


@pytest.mark.parametrize("kind", KINDS)
def test_without_data_the_block_begins_as_in_the_whole_model(tmp_path, kind):
    settings = settings_of(kind, tmp_path)
    settings = replace(settings, validation=8, at=settings.at or ("blocks.0", "blocks.2"))
    task = load_task(settings, device=torch.device("cpu"))
    outline = task_without_data(settings, task.facts)
    assert outline.epoch_size == task.epoch_size
    assert outline.evaluated_at_once == task.evaluated_at_once
    for own, other in (
        (outline.dataset.test, task.dataset.test),
        (outline.dataset.validation, task.dataset.validation),
    ):
        assert own is not None
        assert other is not None
        assert (own.inputs.shape, own.labels.shape) == (other.inputs.shape, other.labels.shape)
    whole = prepare(settings).learner
    for k in (1, 2):
        alone = prepare_alone(settings, k, task=outline, device=torch.device("cpu")).learner
        assert_same(block_state(alone, k, None), block_state(whole, k, None))  # type: ignore[arg-type]
        own = {id(t) for t in alone.block_parameters(k)}
        assert all(parameter.is_meta != (id(parameter) in own) for parameter in alone.parameters())
        assert all(parameter.is_meta for parameter in alone.model.parameters() if id(parameter) not in own)


@pytest.mark.parametrize("k", [0, 1])
def test_an_interrupted_block_resumes_bit_for_bit(tmp_path, k):
    settings = replace(settings_of("images", tmp_path), save_every=2, epochs=3)
    source = options(settings)
    if k:
        train_chain(tmp_path, settings, blocks=1)
        assert main(["cache", str(tmp_path / "b0"), "--yes"]) == 0  # one view for three epochs
        source = ["--from", str(tmp_path / "b0-cache"), "--save-every=2"]
    command = ["train", "--only", str(k), *source]
    assert main([*command, "--out", str(tmp_path / "whole")]) == 0
    with interrupted(BlockTrainer, epoch=2, step=3):
        assert main([*command, "--out", str(tmp_path / "stopped")]) == 130
    assert not BlockRun(tmp_path / "stopped").model.exists()
    assert main(["train", "--only", str(k), "--resume", "--out", str(tmp_path / "stopped")]) == 0
    assert_same(BlockRun(tmp_path / "stopped").weights(), BlockRun(tmp_path / "whole").weights())
    for one, other in zip(lines(tmp_path / "whole"), lines(tmp_path / "stopped"), strict=True):
        assert (one["train_loss"], one["test_loss"]) == (other["train_loss"], other["test_loss"])


def test_views_are_read_in_turn(tmp_path):
    settings = replace(settings_of("images", tmp_path), epochs=4)
    train_chain(tmp_path, settings, blocks=1)
    assert main(["cache", str(tmp_path / "b0"), "--yes", "--views=2"]) == 0
    cache = Activations(tmp_path / "b0-cache")
    block = prepare(BlockRun(tmp_path / "b0").settings())
    block.learner.load_state_dict(BlockRun(tmp_path / "b0").weights(), strict=False)
    first = block.learner.blocks[0].eval()
    epochs = {epoch: list(cache.training(epoch)) for epoch in range(1, 5)}
    for epoch in (1, 2):
        for (h, y), (x, labels) in zip(epochs[epoch], block.training_batches(epoch), strict=True):
            assert torch.equal(y, labels)
            with torch.no_grad():
                assert torch.equal(h, first(x))
    for epoch in (3, 4):
        again, before = (torch.cat([h.flatten(1) for h, _ in epochs[e]]) for e in (epoch, epoch - 2))
        assert not torch.equal(again, before)
        order = torch.cdist(again.double(), before.double()).argmin(1)
        assert torch.equal(order.sort().values, torch.arange(len(order)))
        assert torch.equal(again, before[order])
        labels, known = (torch.cat([y for _, y in epochs[e]]) for e in (epoch, epoch - 2))
        assert torch.equal(labels, known[order])
        later = list(cache.training(epoch, begin=2))
        assert all(torch.equal(h, g) for (h, _), (g, _) in zip(later, epochs[epoch][2:], strict=True))


def test_half_precision_takes_half_the_space(tmp_path):
    settings = settings_of("images", tmp_path)
    train_chain(tmp_path, settings, blocks=1)
    for dtype in ("fp32", "bf16"):
        assert main(["cache", str(tmp_path / "b0"), "--yes", "--dtype", dtype, "--out", str(tmp_path / dtype)]) == 0
    exact, rounded = (Activations(tmp_path / dtype) for dtype in ("fp32", "bf16"))
    for (h, y), (g, z) in zip(exact.ordered("test"), rounded.ordered("test"), strict=True):
        assert torch.equal(y, z)
        assert g.dtype == torch.float32
        assert torch.equal(h.bfloat16().float(), g)
    sizes = [sum(file.stat().st_size for file in cache.path.glob("*.safetensors")) for cache in (exact, rounded)]
    assert 0.49 < sizes[1] / sizes[0] < 0.55


@pytest.mark.parametrize("kind", ["images", "text"])
def test_merged_blocks_are_a_run(tmp_path, kind, capsys):
    settings = replace(settings_of(kind, tmp_path), validation=8)
    runs = train_chain(tmp_path, settings)
    merged = tmp_path / "merged"
    capsys.readouterr()
    assert main(["merge", *(str(runs[k].path) for k in (2, 0, 1)), "--out", str(merged)]) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    records = lines(merged)
    assert [record["train_loss"] for record in records] == [
        [record["train_loss"][0] for record in epoch] for epoch in zip(*(lines(run.path) for run in runs), strict=True)
    ]
    assert records[-1]["test_loss"] == [lines(run.path)[-1]["test_loss"][0] for run in runs]
    learner = prepare(runs[0].settings()).learner
    for run in runs:
        learner.load_state_dict(run.weights(), strict=False)
    assert_same(load_file(merged / "model.safetensors"), dict(learner.model.state_dict()))
    for exit in ("last", "all"):
        assert main(["eval", str(merged), "--exit", exit]) == 0
        found = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert found["accuracy"] == told["accuracy" if exit == "last" else "accuracy_all"]
    train(replace(runs[0].settings(), out=str(tmp_path / "together")))
    assert main(["report", str(merged), str(tmp_path / "together"), "--out", str(tmp_path / "report")]) == 0
    assert "one block at a time" in (tmp_path / "report" / "report.md").read_text()
    if kind == "text":
        assert main(["sample", str(merged), "--tokens", "5", "--exit", "0"]) == 0
