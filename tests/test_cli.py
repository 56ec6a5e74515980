"""The command `bll`: what it prints, where, and its exit codes."""

import importlib.metadata
import json
import re
import sys
import warnings
from dataclasses import fields
from importlib.metadata import requires
from pathlib import Path

import pytest
import rich
import torch

import blocklocal.__main__ as entry
from blocklocal.lab import cli
from blocklocal.lab.arguments import parse
from blocklocal.lab.cli import COMMANDS, main
from blocklocal.lab.commands.blocks import submodules
from blocklocal.lab.models import build
from blocklocal.lab.settings import Settings, flag
from blocklocal.split import split

TINY = ["--model=mlp", "--epochs=2", "--train-size=256", "--test-size=100"]


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    """Commands write below the current folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run(capsys):
    assert main(["train", *TINY, "--out=run"]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_alone_it_says_what_it_can_do(capsys):
    assert main([]) == main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"bll {name}" in text for name in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(capsys, command):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert not stop.value.code
    text = capsys.readouterr().out
    assert f"usage: bll {command}" in text
    assert "%%" not in text


def test_the_benchmark_of_pipelines_has_options_of_its_own(capsys):
    for args, usage, others in [
        (["bench"], "usage: bll bench ", "--rules"),
        (["bench", "--pipeline"], "usage: bll bench --pipeline ", "--processes"),
    ]:
        with pytest.raises(SystemExit):
            main([*args, "--help"])
        text = capsys.readouterr().out
        assert usage in text
        assert "--pipeline" in text
        assert others in text
    assert main(["bench", "--processes=5", "--pipeline"]) == 2
    assert capsys.readouterr().err == "bll: --processes 5: 2 to 4 for the four blocks of a model, to 16 for devices\n"
    assert main(["bench", "--processes=2"]) == 2
    assert "--processes" in capsys.readouterr().err


def test_the_help_shows_the_recipe_of_the_data(capsys):
    for data, model in [("digits", "cnn"), ("cifar10", "resnet18")]:
        with pytest.raises(SystemExit):
            main(["train", data, "--help"])
        assert f"(default: {model})" in " ".join(re.sub("[│╭╰─╮╯]", " ", capsys.readouterr().out).split())


GROUPS = {
    "data": "train_size test_size validation flip crop cutout context windows vocabulary target target_type",
    "model and rule": "model model_args weights blocks at rule head budget lookahead refresh statistic variational "
    "estimate_variance softness power add_beliefs",
    "optimisation": "epochs batch_size accumulate optimizer lr momentum beta2 weight_decay clip schedule warmup "
    "label_smoothing seed",
    "execution": "dtype channels_last device threads compile offload replicas shard message_dtype timeout",
    "output": "out save_every trace tensorboard resume trust",
}


def help_boxes(text: str) -> dict[str, list[str]]:
    """The options under each heading of a help text."""
    boxes = re.findall(r"^ ([a-z ]+?) *\n -+ *\n(.*?)(?=^ [a-z]|\Z)", text, re.DOTALL | re.MULTILINE)
    return {title: re.findall(r"^  (--[a-z0-9-]+)", content, re.MULTILINE) for title, content in boxes}


def test_each_setting_stands_in_one_group_of_the_help(capsys):
    names = [field.name for field in fields(Settings)]
    assert sorted(["data", *" ".join(GROUPS.values()).split()]) == sorted(names)
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    boxes = help_boxes(capsys.readouterr().out)
    assert list(boxes) == ["positional arguments", "options", *(f"{group} options" for group in GROUPS)]
    for group, names in GROUPS.items():
        assert boxes[f"{group} options"] == [flag(name) for name in names.split()]


def test_other_commands_show_the_settings_they_take_in_the_same_groups(capsys):
    with pytest.raises(SystemExit):
        main(["compare", "--help"])
    boxes = help_boxes(capsys.readouterr().out)
    assert boxes["options"] == ["--out", "--rules", "--seeds"]
    assert boxes["output options"] == ["--save-every", "--trace", "--tensorboard"]
    assert "--rule" not in boxes["model and rule options"]


def test_the_groups_change_no_result():
    """-h behind -- is no call for help, but the help is set up."""
    assert parse(Settings, ["--lr=0.5", "--flip", "--", "-h"], prog="bll train") == Settings("-h", lr=0.5, flip=True)


def test_the_page_of_the_command_lists_the_groups():
    page = (Path(__file__).parents[1] / "docs" / "commands.md").read_text()
    rows = dict(re.findall(r"^\| ([a-z ]+) \| (`--.*`) \|$", page, re.MULTILINE))
    assert rows == {group: ", ".join(f"`{flag(name)}`" for name in names.split()) for group, names in GROUPS.items()}


def test_the_version_is_the_packages(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.split()[-1] == importlib.metadata.version("blocklocal")


def test_training_ends_with_one_json_object(capsys):
    assert main(["train", *TINY]) == 0
    captured = capsys.readouterr()
    assert len(captured.out.splitlines()) == 1
    summary = json.loads(captured.out)
    assert {"rule", "blocks", "accuracy", "seconds", "out"} <= summary.keys()
    assert (summary["rule"], summary["blocks"], summary["out"]) == ("bll", 4, "runs/digits-mlp-bll-seed0")
    epochs = [line for line in captured.err.splitlines() if line.startswith("epoch")]
    assert len(epochs) == 2


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["sing"], ["'sing'", "train"]),
        (["train", "nowhere"], ["nowhere", "cifar10"]),
        (["train", "--rule=hebb"], ["hebb", "bll-paper"]),
        (["train", "--model=resnet19"], ["resnet19", "resnet20"]),
        (["train", "--at", "layer9"], ["layer9", "layer1"]),
        (["train", "--blocks=40"], ["blocks=40", "at most"]),
        (["train", "--lr=fast"], ["--lr", "fast"]),
        (["train", "--lr=1e30"], ["block 0", "step", "--lr"]),
        (["train", "--speed=3"], ["--speed"]),
        (["train", "--dtype=fp8"], ["fp8", "bf16"]),
        (["train", "--resume"], ["no run", "digits-cnn-bll-seed0"]),
        (["eval"], ["RUN"]),
        (["eval", "nowhere"], ["nowhere", "no run"]),
        (["blocks"], ["MODEL"]),
        (["blocks", "resnet20", "--blocks=99"], ["blocks=99"]),
        (["blocks", "resnet20", "--size=0"], ["--size 0"]),
        (["blocks", "mlp", "--plan=5"], ["--plan 5", "1 to 4", "--blocks"]),
        (["blocks", "mlp", "--plan=-1"], ["--plan -1", "0 or more"]),
        (["blocks", "mlp", "--plan=2", "--link=fast"], ["--link 'fast'", "100mbit"]),
        (["timeline"], ["RUN"]),
        (["timeline", "nowhere"], ["nowhere", "--trace"]),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(capsys, args, words):
    assert main(args) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    complaint = captured.err.splitlines()[-1]
    assert complaint.startswith("bll: ")
    assert all(word in complaint for word in words), complaint
    assert len([line for line in captured.err.splitlines() if not line.startswith("digits: ")]) == 1


def test_a_run_is_not_overwritten(run, capsys):
    assert main(["train", *TINY, "--out=run"]) == 2
    assert "--resume" in capsys.readouterr().err
    assert main(["train", "--resume", "--out=run"]) == 0
    assert json.loads(capsys.readouterr().out) == run


def test_eval_gives_the_exit_that_is_asked_for(run, capsys):
    def accuracy(*options: str) -> float:
        assert main(["eval", "run", *options]) == 0
        return json.loads(capsys.readouterr().out.splitlines()[-1])["accuracy"]

    exits = [accuracy(f"--exit={k}") for k in range(4)]
    assert accuracy() == exits[3] == run["accuracy"]
    assert accuracy("--exit=all") == run["accuracy_all"]
    assert accuracy("--exit=0.0") == exits[0]
    assert accuracy("--exit=1.0") == exits[3]
    for exit in ("4", "some", "1.5", "-1"):
        assert main(["eval", "run", f"--exit={exit}"]) == 2
        assert f"--exit {exit}" in capsys.readouterr().err


def test_blocks_shows_each_block(capsys):
    assert main(["blocks", "cnn", "--size=8", "--channels=1", "--batch-size=4"]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    cells = [[cell.strip() for cell in row.strip("│").split("│")] for row in rows]
    model = build("cnn", channels=1, size=(8, 8), classes=10)
    assert [row[:3] for row in cells[:2]] == [["0", "layer1", "176"], ["1", "layer2", "4,672"]]
    assert sum(int(row[2].replace(",", "")) for row in cells) == sum(p.numel() for p in model.parameters())
    assert sum(int(row[-2].rstrip("%")) for row in cells) == pytest.approx(100, abs=2)


def test_blocks_shows_what_heads_cost(capsys):
    """Two strided 3x3 convolutions of 32 channels and a linear layer, after one of 16 and 32 channels on 8x8 pixels."""
    assert main(["blocks", "cnn", "--size=8", "--channels=1", "--batch-size=4", "--head=conv"]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    head, block = 9 * 32 * 32 * (4 * 4 + 2 * 2) + 32 * 10, 9 * 16 * 32 * 8 * 8
    assert rows[1].strip("│").split("│")[-1].strip() == f"{head / (head + block):.0%}"
    assert rows[3].strip("│").split("│")[-1].strip() == ""
    assert main(["blocks", "cnn", "--size=8", "--channels=1", "--batch-size=4", "--budget=0.01"]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    assert rows[1].strip("│").split("│")[-1].strip() == "0%"
    assert main(["blocks", "cnn", "--rule=bp", "--head=conv"]) == 2
    assert "it trains the model whole: --head, " in capsys.readouterr().err


def test_submodules_name_every_parameter_once():
    model = build("resnet20", channels=3, size=(32, 32), classes=10)
    chain = split(model, at=["layer1.1", "layer2"])
    assert [submodules(model, block) for block in chain] == [
        ["conv1", "bn1", "layer1.0", "layer1.1"],
        ["layer1.2", "layer2"],
        ["layer3", "fc"],
    ]


def test_the_demo_compares_two_runs(capsys, own_folder):
    assert main(["demo", "--epochs=1", "--out=demo"]) == 0
    out = capsys.readouterr().out
    assert [row.split("│")[1].strip() for row in out.splitlines() if row.startswith("│ b")] == ["bll", "bp"]
    for rule, blocks in [("bll", 4), ("bp", 1)]:
        record = json.loads((own_folder / "demo" / rule / "metrics.jsonl").read_text())
        assert len(record["test_accuracy"]) == blocks


def test_interruption_and_failures_have_their_own_codes(monkeypatch, capsys):
    def stop(args):
        raise KeyboardInterrupt("'run' keeps the checkpoint of epoch 3")

    def fail(args):
        raise OSError(28, "No space left on device", "run/config.json")

    for function, code, words in [(stop, 130, "checkpoint of epoch 3"), (fail, 1, "No space left")]:
        monkeypatch.setattr("blocklocal.lab.commands.blocks.main", function)
        assert main(["blocks"]) == code
        assert re.fullmatch(f"bll: .*{words}.*\n", capsys.readouterr().err)


def test_without_the_lab_extra_it_says_which(monkeypatch, capsys):
    monkeypatch.setattr(entry, "LAB", ("torch", "no_such_package"))
    assert entry.main() == 2
    assert "no_such_package" in (line := capsys.readouterr().err)
    assert "pip install 'blocklocal[lab]'" in line


def test_the_lab_extra_brings_what_the_command_imports():
    names = {"PIL": "pillow", "sklearn": "scikit-learn"}
    extra = {re.split(r"[^\w-]", need)[0] for need in requires("blocklocal") or [] if "lab" in need.partition(";")[2]}
    assert {names.get(package, package) for package in entry.LAB} == extra


def test_the_module_is_the_command(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["blocklocal", "--version"])
    assert entry.main() == 0
    assert cli.version("blocklocal") in capsys.readouterr().out


def test_warnings_are_one_line(monkeypatch, capsys):
    monkeypatch.setattr(
        "blocklocal.lab.commands.blocks.main", lambda args: warnings.warn("block 1 has\ncollapsed", stacklevel=2)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        assert main(["blocks"]) == 0
    assert capsys.readouterr().err == "bll: warning: block 1 has collapsed\n"


def test_blocks_of_a_rule_that_needs_the_targets(capsys):
    assert main(["blocks", "cnn", "--rule=drtp", "--size=8", "--channels=1", "--batch-size=4"]) == 0
    assert "│ 0 " in capsys.readouterr().out


def test_warnings_of_libraries_are_not_ours(monkeypatch, capsys):
    def run(args):
        for file in (torch.__file__, rich.__file__, warnings.__file__):
            warnings.warn_explicit("be warned", UserWarning, file, 1)
        warnings.warn_explicit("be warned too (Triggered internally at x.cpp:1)", UserWarning, cli.__file__, 1)
        warnings.warn_explicit("ours", UserWarning, cli.__file__, 1)

    monkeypatch.setattr("blocklocal.lab.commands.blocks.main", run)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        assert main(["blocks"]) == 0
    assert capsys.readouterr().err == "bll: warning: ours\n"
