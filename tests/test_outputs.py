"""Where commands write: what cannot be is found before the work, and what fails on the way leaves what was there."""

import errno
import json
import os
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from run_folders import write_run
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from blocklocal.lab import cli, outputs
from blocklocal.lab.commands.compare import Options as Compare
from blocklocal.lab.commands.table1 import Options as Table
from blocklocal.lab.runs import folder
from blocklocal.lab.runs.folder import Run
from blocklocal.lab.settings import Settings, folder_name
from blocklocal.lab.training.run import train
from blocklocal.pipeline.trace import Record, Trace

TINY = Settings(model="mlp", epochs=2, train_size=128, test_size=50, threads=1)


def full(*args: object, **options: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.fixture
def no_work(monkeypatch):
    """Nothing that takes time may begin."""

    def begin(*args: object, **options: object) -> None:
        raise AssertionError("the work has begun")

    work = "training.run.prepare", "bench.comparison.find_device", "commands.timeline.load", "commands.report.compose"
    for name in (*work, "sweeps.sweep._train"):
        monkeypatch.setattr(f"blocklocal.lab.{name}", begin)


def places(folder: Path) -> dict[str, str]:
    """Paths that nothing can be written to, and what is said of each."""
    (folder / "file").write_text("mine")
    (folder / "dangling").symlink_to(folder / "nowhere" / "else")
    return {
        f"{folder}/file/below": "Not a directory",
        f"{folder}/file/below/deep": "Not a directory",
        f"{folder}/{'x' * 300}": "too long",
        f"{folder}/made/{'x' * 300}/deep": "too long",
        f"{folder}/{'x/' * 3000}": "too long",
        f"{folder}/zero\0": "null",
        "/proc/nothing/here": "No such file",
        f"{folder}/dangling": "",
    }


def refused(command: list[str], flag: str, folder: Path, capsys: pytest.CaptureFixture[str], *, kind: str = "") -> None:
    """With the option at any such path the command ends with 2 and one line, and leaves nothing."""
    cases = places(folder) | ({} if kind else {f"{folder}/file": "it is a file"})
    before = sorted(folder.rglob("*"))
    for place, words in cases.items():
        end = f"/picture{kind}" if kind else ""
        assert cli.main([*command, f"{flag}={place}{end}"]) == 2, place
        out, err = capsys.readouterr()
        assert err.startswith(f"bll: {flag} "), err
        assert words in err
        assert err.count("\n") == 1
        assert out == ""
    assert sorted(folder.rglob("*")) == before
    assert (folder / "file").read_text() == "mine"


@pytest.mark.parametrize(
    "command",
    [
        ["train"],
        ["launch"],
        ["compare", "--rules=bll", "--seeds=1"],
        ["table1", "--rules=bll", "--datasets=cifar10", "--seeds=1"],
        ["demo"],
        ["report", "RUN"],
    ],
    ids=lambda command: command[0],
)
def test_folders_that_cannot_be_written_to(tmp_path, capsys, no_work, command):
    run = write_run(tmp_path / "run", accuracies=[0.5])
    refused([str(run) if word == "RUN" else word for word in command], "--out", tmp_path, capsys)


@pytest.mark.parametrize(
    ("command", "flag", "kind"),
    [
        (["bench", "--model=mlp"], "--plot", ".png"),
        (["timeline", "RUN"], "--out", ".svg"),
        (["report", "RUN"], "--html", ".html"),
    ],
    ids=["bench", "timeline", "report"],
)
def test_files_that_cannot_be_written(tmp_path, capsys, no_work, command, flag, kind):
    run = write_run(tmp_path / "run", accuracies=[0.5])
    (run / "trace").mkdir()
    (run / "trace" / "rank0.jsonl").touch()
    command = [str(run) if word == "RUN" else word for word in command]
    refused(command, flag, tmp_path, capsys, kind=kind)
    (tmp_path / f"folder{kind}").mkdir()
    os.mkfifo(tmp_path / f"pipe{kind}")
    for name, words in [
        (f"folder{kind}", "is not a regular file"),
        (f"pipe{kind}", "is not a regular file"),
        ("x" * 250 + kind, "too long"),
    ]:
        assert cli.main([*command, f"{flag}={tmp_path / name}"]) == 2
        assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "flag"),
    [(["bench", "--model=mlp"], "--plot"), (["timeline", "RUN"], "--out")],
    ids=["bench", "timeline"],
)
def test_pictures_of_a_kind_that_is_not_drawn(tmp_path, capsys, no_work, command, flag):
    run = write_run(tmp_path / "run", accuracies=[0.5])
    (run / "trace").mkdir()
    (run / "trace" / "rank0.jsonl").touch()
    for name in ("picture.gif", "picture", "picture.svgz"):
        assert cli.main([*(str(run) if word == "RUN" else word for word in command), f"{flag}={tmp_path / name}"]) == 2
        assert "a picture must be .svg or .png" in capsys.readouterr().err


def test_files_of_a_run_are_not_overwritten(tmp_path, capsys):
    run = write_run(tmp_path / "run", accuracies=[0.5])
    (run / "trace").mkdir()
    (run / "trace" / "rank0.jsonl").touch()
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    for command in (
        ["timeline", str(run), f"--out={run}/config.svg"],
        ["report", str(run), f"--html={run}/config.json"],
    ):
        assert cli.main(command) == 2
        assert "would overwrite a file of the run" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("command", [["train"], ["compare", "--rules=bll"], ["demo"], ["bench", "--model=mlp"]])
def test_a_full_disk_is_found_before_the_work(tmp_path, monkeypatch, capsys, no_work, command):
    class Full:
        __enter__, __exit__ = lambda self: self, lambda *_: None
        write = full

    monkeypatch.setattr(tempfile, "TemporaryFile", lambda **_: Full())
    where = f"--plot={tmp_path}/new/a.png" if command[0] == "bench" else f"--out={tmp_path}/new/run"
    assert cli.main([*command, where]) == 2
    assert "cannot be written to (No space left on device)" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_write_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    file = tmp_path / "file"

    def half(part: Path) -> None:
        part.write_text("half")
        full()

    with pytest.raises(OSError, match=rf"^'{file}' was not written \(No space left on device\)$"):
        outputs.write(file, half)
    assert not list(tmp_path.iterdir())
    outputs.write(file, lambda part: part.write_text("first"))
    for how in (half, lambda part: half(part) or part):
        with pytest.raises(OSError, match="was not written"):
            outputs.write(file, how)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="was not written"):
            outputs.write(file, lambda part: part.write_text("second"))
    with pytest.raises(KeyboardInterrupt):
        outputs.write(file, lambda part: part.write_text("second") and (_ for _ in ()).throw(KeyboardInterrupt))
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"file": "first"}


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "folder" / "file")
    outputs.write(tmp_path / "link", lambda part: part.write_text("text"))
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "folder" / "file").read_text() == "text"


def test_a_trace_is_written_whole_or_not(tmp_path, monkeypatch):
    trace = Trace(rank=0, replica=0, device=torch.device("cpu"))
    trace.records.append(Record(0, 0, 0, 0, "wait", 0.0, 1.0))
    trace.save(tmp_path / "rank0.jsonl")
    before = (tmp_path / "rank0.jsonl").read_bytes()
    trace.records.append(Record(0, 0, 0, 0, "forward", 1.0, 2.0))
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", full)
        with pytest.raises(OSError, match="No space left"):
            trace.save(tmp_path / "rank0.jsonl")
    assert [path.name for path in tmp_path.iterdir()] == ["rank0.jsonl"]
    assert (tmp_path / "rank0.jsonl").read_bytes() == before


def test_a_configuration_that_cannot_be_written_leaves_no_run(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"config.json' was not written \(No space left on device\)"):
        train(replace(TINY, out=str(tmp_path / "new" / "run")))
    assert not list(tmp_path.iterdir())


def refuse_safetensors(model: nn.Module, name: str) -> None:
    Path(name).write_bytes(b"half")
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


def test_a_model_that_cannot_be_written_is_written_on_resumption(tmp_path, monkeypatch, capsys):
    train(replace(TINY, out=str(tmp_path / "whole")))
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(folder, "save_model", refuse_safetensors)
        command = ["train", "--model=mlp", "--epochs=2", "--train-size=128", "--test-size=50", f"--out={out}"]
        assert cli.main(command) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert "model.safetensors' was not written" in line
    assert "keeps the checkpoint of epoch 2" in line
    assert sorted(path.name for path in out.iterdir()) == ["checkpoint", "config.json", "metrics.jsonl"]
    train(replace(TINY, out=str(out), resume=True))
    whole, resumed = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "run"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_a_record_that_cannot_be_written_says_what_is_kept(tmp_path, monkeypatch):
    append, settings = Run.append, replace(TINY, out=str(tmp_path / "run"))

    def refuse_the_second(run: Run, record: dict) -> None:
        with monkeypatch.context() as patch:
            if record["epoch"] == 2:
                patch.setattr(os, "fsync", full)
            append(run, record)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "append", refuse_the_second)
        with pytest.raises(
            OSError, match=r"metrics.jsonl' was not written \(No space left.*\); .*checkpoint of epoch 1$"
        ):
            train(settings)
    train(replace(settings, resume=True))
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == [1, 2]


NAMES = ["../x", "/etc/x", "..", ".", "/", "", "a b", "a\nb", "[red]", "\x1b[31m", "x\0y", "a:../b", "$x|y`z", "é" * 99]


@pytest.mark.parametrize("name", NAMES)
def test_names_of_things_do_not_lead_out_of_a_folder(tmp_path, name):
    home = tmp_path / "home"
    folders = [
        home / folder_name(name, "seed0"),
        *(run.folder for run in Table(datasets=f"{name or 'x'}", seeds=1, out=str(home)).sweep),
        *(run.folder for run in Compare(rules=name or "x", seeds=1, out=str(home)).sweep),
    ]
    for path in folders:
        assert Path(os.path.abspath(path)).parent == home
        assert path.name.replace("-", "").replace(".", "").replace("_", "").replace("+", "").isalnum()
    for settings in (Settings(data=name), Settings(model=name), Settings(rule=name)):
        assert Path(os.path.abspath(settings.folder)).parent == Path("runs").absolute()
    assert Path(os.path.abspath(Compare(data=name, model=name).home)).parent == Path("runs").absolute()


def test_two_runs_of_a_series_have_two_folders(tmp_path, capsys, no_work):
    command = ["table1", "--datasets=a/x,b/x", "--rules=bll", "--seeds=1", f"--out={tmp_path / 'home'}"]
    assert cli.main(command) == 2
    assert "would be kept in one folder" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
