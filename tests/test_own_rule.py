"""`--rule package.module:function`: a rule of the user's own, in every command, and what is wrong with one."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from safetensors.torch import load_file

from blocklocal.lab.cli import main

RULE = """
import blocklocal as bll

def evidence(model, *, classes, blocks, at, example, criterion, seed):
    loss = bll.Variational() + bll.Predictive()
    places = {"at": at} if at else {"blocks": blocks}
    return bll.BlockLocal(model, classes=classes, example=example, criterion=criterion, loss=loss, **places)

def other(model, *, classes, blocks, at, example, criterion, seed):
    return bll.BlockLocal(bll.split(model, blocks=2, example=example), classes=classes, example=example)

def nothing(model, **options):
    return None

def short(model, *, classes):
    return None

def broken(model, **options):
    return model.missing

number = 3
"""
SMALL = ["digits", "--model=mlp", "--blocks=3", "--epochs=1", "--train-size=256", "--test-size=100"]


@pytest.fixture
def here(tmp_path, monkeypatch):
    (tmp_path / "own_rules.py").write_text(RULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    sys.modules.pop("own_rules", None)


def test_it_trains_as_the_built_in_rule_of_the_same_loss(here):
    """The default loss is 0.1 of the variational term; --variational makes it the loss of the function."""
    own = ["train", *SMALL, "--rule=own_rules:evidence", "--out=own"]
    assert main(own) == 0
    assert main(["train", *SMALL, "--rule=bll", "--head=normalised", "--variational=1", "--out=built"]) == 0
    weights, expected = load_file("own/model.safetensors"), load_file("built/model.safetensors")
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    assert json.loads((here / "own" / "config.json").read_text())["settings"]["rule"] == "own_rules:evidence"


def test_a_run_with_it_is_opened_with_trust_alone(here, capsys):
    assert main(["train", *SMALL, "--rule=own_rules:evidence", "--out=own"]) == 0
    capsys.readouterr()
    for command in (["eval", "own"], ["train", *SMALL, "--out=own", "--resume"]):
        assert main(command) == 2
        assert "the rule 'own_rules:evidence', whose code would be run" in capsys.readouterr().err
        assert main([*command, "--trust"]) == 0
    assert main(["train", *SMALL, "--rule=own_rules:evidence", "--out=own", "--resume"]) == 0


def test_it_is_compared_with_backpropagation_and_measured(here, capsys):
    assert main(["compare", *SMALL, "--rules=own_rules:evidence,bp", "--seeds=1", "--head=linear", "--out=c"]) == 2
    assert "leave --head" in capsys.readouterr().err
    args = [
        "bench",
        "--model=cnn",
        "--size=8",
        "--blocks=2",
        "--rules=own_rules:evidence",
        "--steps=1",
        "--batch-size=8",
    ]
    assert main([*args, "--warmup=0", "--json"]) == 0
    record = json.loads(capsys.readouterr().out.splitlines()[-1])["rules"]["own_rules:evidence"]
    assert record["blocks"] == 2


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        ("own_rules:other", "must return a bll.BlockLocal of the model"),
        ("own_rules:nothing", "must return a bll.BlockLocal of the model"),
        ("own_rules:short", "must accept a model and classes=, blocks=, at="),
        ("own_rules:broken", "cannot be applied: AttributeError"),
        ("own_rules:absent", "has no function 'absent'"),
        ("own_rules:number", "has no function 'number'"),
        ("absent:rule", "there is no module 'absent'"),
        ("own_rules", "or package.module:function"),
    ],
)
def test_what_is_no_rule_is_refused_before_anything_is_written(here, capsys, rule, said):
    assert main(["train", *SMALL, f"--rule={rule}", "--out=own"]) == 2
    assert said in capsys.readouterr().err
    assert not (here / "own").exists()
