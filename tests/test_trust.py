"""Runs of strangers: their code is not run unasked, and data are not taken for those that they were trained on."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from data_folders import encode, picture, write_images

from blocklocal.lab.cli import main
from blocklocal.lab.errors import UserError
from blocklocal.lab.models import MODELS
from blocklocal.lab.settings import Settings
from blocklocal.lab.tasks.grading import LabelGrading
from blocklocal.lab.training.evaluation import Exits
from blocklocal.lab.training.recipes import refuse_code
from blocklocal.lab.training.rules import RULES

NET = """
from pathlib import Path
from torch import nn

Path("imported").touch()

def net(*, channels, size, classes):
    n = channels * size[0] * size[1]
    return nn.Sequential(nn.Flatten(), nn.Linear(n, 16), nn.ReLU(), nn.Linear(16, classes))
"""
TINY = ["--train-size=64", "--test-size=20", "--batch-size=16", "--epochs=1", "--blocks=2"]


IMAGES = {f"{part}/{name}/{i}.png": encode(picture()) for part in ("train", "test") for name in "ab" for i in range(10)}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a run of a function, whose module writes a file when it is imported, and a run on images."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "code").mkdir()
    (folder / "code" / "strange.py").write_text(NET)
    write_images(folder / "data", IMAGES)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.syspath_prepend(folder / "code")
        assert main(["train", "--model=strange:net", "--out=run", *TINY]) == 0
        assert main(["train", "data", "--out=seen", "--model=mlp", *TINY[2:]]) == 0
    forget(folder)
    return folder


@pytest.fixture
def here(trained, tmp_path, monkeypatch):
    """A copy of it, as the current folder."""
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path / "code")
    yield tmp_path
    sys.modules.pop("strange", None)


def forget(here):
    sys.modules.pop("strange", None)
    (here / "imported").unlink()


def refused(capsys, args: list[str]) -> str:
    assert main(args) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    return captured.err


@pytest.mark.parametrize(
    ("args", "remedy"),
    [
        (["eval", "run"], "add --trust"),
        (["train", "--out=run", "--resume"], "repeat --model strange:net or add --trust"),
        (["train", "--out=run", "--resume", "--model=cnn"], "repeat --model strange:net"),
        (["launch", "--out=run", "--resume"], "repeat --model strange:net or add --trust"),
    ],
)
def test_the_code_of_a_run_is_not_run_unasked(here, capsys, args, remedy):
    config = here / "run" / "config.json"
    stored = json.loads(config.read_text())
    stored["settings"]["trust"] = True  # a stranger would like that
    for content in (config.read_text(), json.dumps(stored)):
        config.write_text(content)
        refused(capsys, args)
        assert not (here / "imported").exists()
    del stored["settings"]["trust"]
    config.write_text(json.dumps(stored))
    said = refused(capsys, args)
    assert remedy in said
    assert "'run'" in said


@pytest.mark.parametrize(
    "args",
    [
        ["eval", "run", "--trust"],
        ["train", "--out=run", "--resume", "--trust"],
        ["train", "--out=run", "--resume", "--model=strange:net"],
    ],
)
def test_code_that_is_trusted_is_run(here, capsys, args):
    assert main(args) == 0
    assert (here / "imported").exists()
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["accuracy"] > 0


def test_models_of_known_packages_need_no_trust():
    for name in [*MODELS, "timm:net", "torchvision:net", "hf:net", "resnet19"]:
        refuse_code(Settings(model=name), run=Path("run"))
    for name in ("mine:net", "timm.evil:net", "Timm:net", ":", "os:system"):
        with pytest.raises(UserError, match="'run' has the model"):
            refuse_code(Settings(model=name), run=Path("run"))
    for name in RULES:
        refuse_code(Settings(rule=name), run=Path("run"))
    with pytest.raises(UserError, match="'run' has the rule"):
        refuse_code(Settings(rule="mine:rule"), run=Path("run"))


def test_trust_is_no_setting_of_a_run(here):
    settings = json.loads((here / "run" / "config.json").read_text())["settings"]
    assert "trust" not in settings
    assert Settings().contradictions(Settings(trust=True)) == []


OTHERS = {
    "one image less": ({"train/a/0.png": None}, "training images 19 now, 20 then"),
    "one test image more": ({"test/a/10.png": encode(picture())}, "test images 21 now, 20 then"),
    "other classes": ({name.replace("/b/", "/c/"): None for name in IMAGES}, "classes ['a', 'c'] now, ['a', 'b'] then"),
    "another size": ({name: encode(picture(9, 9)) for name in IMAGES}, "shape [3, 9, 9] now, [3, 8, 8] then"),
    "grey": ({name: encode(picture(channels=1)) for name in IMAGES}, "shape [1, 8, 8] now, [3, 8, 8] then"),
    "another image of the same size": ({"train/b/7.png": encode(picture())}, "trained on: digest "),
}


def changed(images: dict, changes: dict) -> dict:
    renamed = any("/c/" in name for name in changes)
    names = {name: name.replace("/b/", "/c/") if renamed else name for name in images}
    kept = {names[name]: content for name, content in images.items()}
    return {name: content for name, content in (kept | ({} if renamed else changes)).items() if content is not None}


@pytest.mark.parametrize("name", OTHERS)
def test_another_data_set_is_not_taken_for_that_of_the_run(here, capsys, name):
    changes, words = OTHERS[name]
    write_images(here / "other", changed(IMAGES, changes))
    said = refused(capsys, ["eval", "seen", "--data=other"])
    assert words in said
    assert "'other'" in said
    (here / "data").rename(here / "before")
    (here / "other").rename(here / "data")
    assert words in refused(capsys, ["train", "data", "--out=seen", "--resume"])
    assert main(["eval", "seen", "--data=before"]) == 0


def test_a_run_that_knows_no_digest_is_read(here, capsys):
    config = json.loads((here / "seen/config.json").read_text())
    assert len(config["data"].pop("digest")) == 64
    (here / "seen/config.json").write_text(json.dumps(config))
    assert main(["eval", "seen"]) == 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--exit=2"], "--exit 2: choose last, all, a block from 0 to 1"),
        (["--exit=-1"], "--exit -1"),
        (["--exit="], "--exit=: the value is empty"),
        (["--exit=nan"], "--exit nan"),
        (["--exit=1.01"], "--exit 1.01"),
        (["--exit=1e-1"], "--exit 1e-1"),
        (["--exit=٣"], "--exit ٣"),
        (["--data=nowhere"], "unknown data 'nowhere'"),
        (["--data=run"], "holds neither"),
        (["--device=cuda:99"], "--device 'cuda:99'"),
        (["--device=abacus"], "--device 'abacus'"),
    ],
)
def test_an_evaluation_that_cannot_be_is_one_line(here, capsys, monkeypatch, options, words):
    monkeypatch.setattr(
        "blocklocal.lab.training.experiment.evaluate", None
    )  # an exit is refused before the images are tested
    assert words in refused(capsys, ["eval", "seen", *options])


def test_nan_is_not_counted_as_a_class():
    grading = LabelGrading(2)
    scores = torch.tensor([[[0.5, 0.6], [0.7, 0.8]], [[0.5, 0.6], [0.7, torch.nan]]])
    grades = grading.grade(scores, torch.tensor([0, 1]))
    with pytest.raises(UserError, match="exit 1 gives nan for test sample 1"):
        Exits(grading, grades, {})
