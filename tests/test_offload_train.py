"""`bll train --offload`: the same run to the bit, interrupted or not, and what it refuses."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from interruption import interrupted
from safetensors.torch import load_file

from blocklocal.lab.cli import main
from blocklocal.lab.data.batches import Normalisation
from blocklocal.lab.data.dataset import Dataset, Split
from blocklocal.lab.errors import UserError
from blocklocal.lab.settings import Settings
from blocklocal.lab.tasks.find import load_task
from blocklocal.lab.training import file_memory
from blocklocal.lab.training.offloaded_trainer import OffloadedTrainer
from blocklocal.lab.training.run import train

TINY = Settings(
    model="cnn",
    epochs=2,
    train_size=256,
    test_size=100,
    validation=50,
    threads=1,
    clip=1.0,
    optimizer="adamw",
    lr=1e-3,
    weight_decay=0.1,
    save_every=2,
)
TIMES = ("seconds", "peak_memory_mib")


def results(run: Path) -> tuple[list[dict], dict, list[dict]]:
    """What a run leaves, without its times: the lines of metrics.jsonl, the weights, and the last checkpoint."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    parts = sorted(run.glob("checkpoint*/step-*/block-*/tensors.safetensors"))
    assert parts
    kept = [{name: tensor.tolist() for name, tensor in load_file(part).items()} for part in parts]
    weights = {name: tensor.tolist() for name, tensor in load_file(run / "model.safetensors").items()}
    return [{name: value for name, value in line.items() if name not in TIMES} for line in lines], weights, kept


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple:
    run = tmp_path_factory.mktemp("whole") / "run"
    train(replace(TINY, out=str(run)))
    return results(run)


@pytest.fixture
def in_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors of small models are in files too."""
    monkeypatch.setattr(file_memory, "LARGE", 2**8)
    monkeypatch.setattr(file_memory, "RESIDENT", 2**22)


@pytest.mark.slow
@pytest.mark.usefixtures("in_files")
@pytest.mark.parametrize("offload", ["cpu", "disk", "disk:FOLDER"])
def test_an_offloaded_run_is_the_same(tmp_path: Path, undisturbed: tuple, offload: str) -> None:
    train(replace(TINY, out=str(tmp_path / "run"), offload=offload.replace("FOLDER", str(tmp_path / "elsewhere"))))
    assert results(tmp_path / "run") == undisturbed
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert not (tmp_path / "run/blocks").exists()


@pytest.mark.slow
@pytest.mark.usefixtures("in_files")
@pytest.mark.parametrize("then", ["disk", "none"])
def test_an_interrupted_run_goes_on_the_same(tmp_path: Path, undisturbed: tuple, then: str) -> None:
    settings = replace(TINY, out=str(tmp_path / "run"), offload="disk")
    with interrupted(OffloadedTrainer, epoch=2, step=2), pytest.raises(KeyboardInterrupt):
        train(settings)  # there is a checkpoint of the step before
    part = next((tmp_path / "run").glob("checkpoint/step-*/block-1/tensors.safetensors"))
    part.rename(tmp_path / "away")
    with pytest.raises(UserError, match="is not a readable checkpoint"):
        train(replace(settings, resume=True, offload=then))
    assert not (tmp_path / "run/blocks").exists()
    (tmp_path / "away").rename(part)
    train(replace(settings, resume=True, offload=then))
    assert results(tmp_path / "run") == undisturbed


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("offload", ["cpu", "disk"])
def test_on_a_gpu_the_model_is_never_there_whole(tmp_path: Path, offload: str) -> None:
    """Perceptrons, since the gradients of convolutions are not the same twice on a GPU."""
    settings = replace(TINY, model="mlp", blocks=4, device="cuda")
    peaks = []
    for chosen in ("none", offload):
        torch.cuda.reset_peak_memory_stats()
        train(replace(settings, out=str(tmp_path / chosen), offload=chosen))
        peaks.append(torch.cuda.max_memory_allocated())
    with interrupted(OffloadedTrainer, epoch=2, step=2), pytest.raises(KeyboardInterrupt):
        train(replace(settings, out=str(tmp_path / "resumed"), offload=offload))
    train(replace(settings, out=str(tmp_path / "resumed"), offload=offload, resume=True))
    assert results(tmp_path / offload) == results(tmp_path / "resumed") == results(tmp_path / "none")
    assert peaks[1] < peaks[0]


def on(device: torch.device, owner: object) -> bool:
    """Whether all tensors that an object has, or objects that it has, are there."""
    found = [
        value for value in vars(owner).values() if isinstance(value, (torch.Tensor, Dataset, Split, Normalisation))
    ]
    return all(value.device == device if isinstance(value, torch.Tensor) else on(device, value) for value in found)


@pytest.mark.parametrize("data", ["digits", "text", "table:iris", "table:diabetes"])
def test_the_data_go_to_another_device_than_the_model(tmp_path: Path, data: str) -> None:
    (tmp_path / "text").write_text("to be or not to be " * 200)
    settings = Settings(data=data.replace("text", f"text:{tmp_path}/text"), context=8, validation=4)
    here, there = torch.device("cpu"), torch.device("meta")
    task = load_task(settings, device=here)
    assert on(there, task.to(there))
    assert on(here, task)


def test_blocks_over_processes_are_not_offloaded(capsys: pytest.CaptureFixture) -> None:
    assert main(["launch", "digits", "--offload", "cpu"]) == 2
    assert "--offload is for a run in one process" in capsys.readouterr().err


REFUSED = {
    "schedule-free": (
        ["--offload", "cpu", "--optimizer", "schedulefree", "--schedule", "constant"],
        "--optimizer schedulefree does not allow",
    ),
    "unknown": (["--offload", "gpu"], "--offload 'gpu' is unknown: choose none, cpu, disk or disk:FOLDER"),
    "no folder": (["--offload", "disk:"], "is unknown"),
    "a folder of memory": (["--offload", "cpu:here"], "is unknown"),
    "accumulation": (["--offload", "cpu", "--accumulate", "2"], "leave it out, or --accumulate"),
    "compilation": (["--offload", "cpu", "--compile"], "leave it out, or --compile"),
    "lookahead": (["--offload", "cpu", "--lookahead", "both"], "leave it out, or --lookahead"),
    "unembedding": (["--offload", "cpu", "--head", "unembedding"], "leave it out, or --head unembedding"),
    "a rule for the whole": (["--offload", "cpu", "--rule", "dfa"], "--rule dfa trains the model whole"),
    "one block": (["--offload", "cpu", "--rule", "bp"], "two blocks or more"),
    "another's folder": (["--offload", "disk:."], "pass a folder of its own"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_go_together_is_refused(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    options, said = REFUSED[name]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").write_text("notes")
    assert main(["train", "digits", "--train-size", "128", "--out", str(tmp_path / "run"), *options]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes.txt"]
