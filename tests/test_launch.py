"""Runs over processes: the same run as in one process, whatever breaks. At length: `python tests/faults.py`."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import faults
import pytest
import torch

from blocklocal.lab.cli import main
from blocklocal.lab.runs.folder import Run
from blocklocal.lab.runs.lock import alone
from blocklocal.lab.training.recipes import DIGITS
from blocklocal.lab.training.run import train

EPOCHS = 4


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return faults.reference(tmp_path_factory.mktemp("whole"), epochs=EPOCHS)


@pytest.fixture
def launch(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """launch(out, *options, processes=n): the launcher is the test's own process, where nothing breaks but the others.

    Gives the exit code, and what was said on standard error.
    """
    for name, value in {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1")

    def run(out: Path, *options: str, processes: int) -> tuple[int, str]:
        capfd.readouterr()
        code = main(["launch", f"--processes={processes}", *faults.with_settings(options), f"--out={out}"])
        return code, capfd.readouterr().err

    return run


def listening(pids: list[int]) -> set[str]:
    """The local addresses, as /proc writes them, at which these processes wait for connections."""
    sockets = {os.readlink(file) for pid in pids for file in Path(f"/proc/{pid}/fd").iterdir() if file.is_symlink()}
    rows = [row.split() for kind in ("tcp", "tcp6") for row in Path(f"/proc/net/{kind}").read_text().splitlines()[1:]]
    return {row[1].split(":")[0] for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in sockets}


@pytest.mark.parametrize("processes", [2, pytest.param(3, marks=pytest.mark.long)])
def test_processes_are_one_run_and_listen_to_this_machine_alone(tmp_path, whole, processes):
    stale = tmp_path / "run" / "trace" / "rank7.jsonl"
    stale.parent.mkdir(parents=True)
    stale.write_text("of more processes than there are now\n")
    run = faults.Launched(tmp_path / "run", f"--epochs={EPOCHS}", "--trace", processes=processes)
    run.wait_until_training()
    addresses = listening([run.launcher.pid, *run.pids()])
    assert addresses, "the processes do meet"
    assert addresses <= {"0100007F", "0000000000000000FFFF00000100007F", "00000000000000000000000001000000"}, addresses
    output, said = run.launcher.communicate(timeout=faults.PATIENCE)
    assert run.launcher.returncode == 0, said
    assert faults.same(run.out, whole)
    assert f"4 blocks over {processes} processes" in said
    summary = json.loads(output.splitlines()[-1])
    assert summary["accuracy"] == faults.course(whole)[-1][2][-1]
    assert {"config.json", "metrics.jsonl", "model.safetensors"} <= {path.name for path in run.out.iterdir()}
    assert f"epoch {EPOCHS}/{EPOCHS}" in (run.out / "logs" / f"rank{processes - 1}.log").read_text()
    assert main(["timeline", str(run.out)]) == 0
    assert (run.out / "timeline.svg").exists()
    assert main(["eval", str(run.out)]) == 0


LONG = [pytest.param(*one, marks=pytest.mark.long) for one in (("bf16", 1), ("bf16", 3), ("fp32", 2))]


@pytest.mark.parametrize(("dtype", "processes"), [*LONG, ("bf16", 2)])
def test_clipping_and_accumulation_are_those_of_one_process_in_either_arithmetic(tmp_path, launch, dtype, processes):
    """And validation, and in bf16 beliefs that add."""
    beliefs = dtype == "bf16"
    settings = {"model": "mlp", "dtype": dtype, "clip": 0.5, "accumulate": 3, "epochs": 2, "train_size": 512}
    settings |= {
        "test_size": 100,
        "batch_size": 16,
        "save_every": 8,
        "threads": 1,
        "warmup": 1.0,
        "seed": 1,
        "validation": 100,
    }
    train(replace(DIGITS, **settings, add_beliefs=beliefs, out=str(tmp_path / "whole")))
    options = [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]
    options += ["--add-beliefs"] * beliefs
    out = tmp_path / "launched"
    code, said = launch(out, *options, processes=processes)
    assert code == 0, said
    assert faults.same(out, tmp_path / "whole")
    names = ("validation_accuracy", "validation_accuracy_all", "exit_weights")
    ours, theirs = (
        [[record[name] for name in names] for record in Run(path).records()] for path in (out, tmp_path / "whole")
    )
    assert ours == theirs


@pytest.mark.long
def test_the_statistic_over_processes_is_that_of_one(tmp_path):
    options = ["--model=cnn", "--blocks=2", "--statistic=grid", "--train-size=256"]
    whole = faults.reference(tmp_path, *options, epochs=1)
    run = faults.Launched(tmp_path / "run", *options, "--epochs=1", processes=2)
    code, said = run.end()
    assert code == 0, said
    assert faults.same(run.out, whole)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_one_process_on_a_gpu_changes_nothing(tmp_path):
    """Over NCCL; a perceptron, since the gradients of convolutions are not the same twice on a GPU."""
    options = ["digits", "--model=mlp", "--epochs=2", "--device=cuda"]
    for command, out in (("train", "whole"), ("train", "again"), ("launch", "launched")):
        given = [*faults.BLL, command, *options, f"--out={tmp_path / out}"]
        given += ["--processes=1"] * (command == "launch")
        done = subprocess.run(given, capture_output=True, text=True, timeout=faults.PATIENCE)
        assert done.returncode == 0, done.stderr
    assert faults.same(tmp_path / "again", tmp_path / "whole"), "two runs of one process differ"
    assert faults.course(tmp_path / "launched") == faults.course(tmp_path / "whole")
    assert faults.same(tmp_path / "launched", tmp_path / "whole")


def test_torchrun_runs_the_same_command(tmp_path, whole):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "blocklocal"]
    command = [*torchrun, "train", *faults.SETTINGS, f"--epochs={EPOCHS}", f"--out={tmp_path / 'run'}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=faults.PATIENCE)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["blocks"] == 4
    assert faults.same(tmp_path / "run", whole)


@pytest.mark.long
@pytest.mark.parametrize("options", [(), ("--shard",)])
def test_replicas_share_a_minibatch(tmp_path, whole, options, capsys):
    """Batch normalisation sees 8 images in place of 16: near, not the same. The weights that are kept are whole."""
    run = faults.Launched(tmp_path / "run", f"--epochs={EPOCHS}", "--replicas=2", *options, processes=4)
    run.wait_until_training()
    if options:
        run.until(run.cuts)
        run.signal(3, signal.SIGKILL)  # goes on from what the first replica kept, of which each takes its share
    code, said = run.end()
    assert code == 0, said
    assert ("killed by SIGKILL" in said) == bool(options)
    (_, first, _), (_, expected, _) = faults.course(run.out)[0], faults.course(whole)[0]
    assert first == pytest.approx(expected, rel=0.25)
    reached = faults.course(run.out)[-1][2]
    assert reached[-1] > 0.8
    for k, accuracy in enumerate(reached):
        assert main(["eval", f"--exit={k}", str(run.out)]) == 0
        assert json.loads(capsys.readouterr().out.splitlines()[-1])["accuracy"] == accuracy


@pytest.mark.parametrize("kills", [1, pytest.param(2, marks=pytest.mark.long)])
def test_a_killed_process_changes_nothing(tmp_path, whole, kills):
    faults.kill_one_after_another(tmp_path, whole, epochs=EPOCHS, kills=kills, processes=2)


@pytest.mark.long
def test_a_killed_process_changes_nothing_where_copies_travel(tmp_path, capsys):
    """Checkpoints stand between two refreshes."""
    options = ("--lookahead=both", "--refresh=40", "--add-beliefs")
    whole = faults.reference(tmp_path, *options, epochs=3)
    faults.kill_one_after_another(tmp_path, whole, *options, "--trace", epochs=3, kills=1, processes=3)
    assert main(["timeline", str(tmp_path / "kills")]) == 0
    assert re.search(r"copies against the stream: \d+, of \d\.\d\d MiB together", capsys.readouterr().out)


@pytest.mark.long
def test_a_stopped_process_is_noticed(tmp_path, whole):
    faults.stop(tmp_path, whole, epochs=EPOCHS, timeout=3, processes=2)


@pytest.mark.long
def test_nothing_outlives_the_launcher(tmp_path, whole):
    faults.kill_launcher(tmp_path, whole, epochs=EPOCHS, processes=2)


@pytest.mark.parametrize("numbers", [(2,), pytest.param((4, 2), marks=pytest.mark.long)])
def test_control_c_ends_all_and_another_number_of_processes_goes_on(tmp_path, whole, numbers):
    """At last one process, of `bll train`."""
    faults.change_processes(tmp_path, whole, epochs=EPOCHS, numbers=numbers)


@pytest.mark.long
def test_a_full_disk(tmp_path, whole):
    try:
        faults.fill_disk(tmp_path, whole, epochs=EPOCHS, processes=2)
    except PermissionError as error:
        pytest.skip(f"no file system can be mounted here: {error}")


@pytest.mark.long
def test_two_machines_whose_link_breaks(tmp_path, whole):
    try:
        faults.cut_cable(tmp_path, whole, epochs=EPOCHS, seconds=2)
    except PermissionError as error:
        pytest.skip(f"no network namespace can be made here: {error}")


def test_an_interruption_at_the_start_is_one_line(tmp_path):
    run = faults.Launched(tmp_path / "run", "--epochs=100", processes=2)
    children = Path(f"/proc/{run.launcher.pid}/task/{run.launcher.pid}/children")
    run.until(lambda: len(children.read_text().split()) == 2)
    run.launcher.send_signal(signal.SIGINT)
    code, said = run.end()
    assert (code, said) == (130, "bll: interrupted\n")
    assert not run.out.exists()


def importable(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For the processes that are started."""
    monkeypatch.setenv("PYTHONPATH", str(folder), prepend=os.pathsep)


FUSE = """
import torch
from torch import nn

class Fuse(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, x):
        if self.training:
            self.steps += 1
        return x * torch.where(self.steps > 70, torch.nan, 1.0)

def fuse(*, channels, size, classes):
    n = channels * size[0] * size[1]
    return nn.Sequential(nn.Flatten(), nn.Linear(n, 16), nn.ReLU(), nn.Linear(16, 16), Fuse(), nn.Linear(16, classes))
"""


def test_what_no_restart_can_mend_ends_the_run(tmp_path, monkeypatch, launch):
    (tmp_path / "own_fuse.py").write_text(FUSE)
    importable(tmp_path, monkeypatch)
    code, said = launch(tmp_path / "run", "--model=own_fuse:fuse", "--at", "1", "3", "--epochs=3", processes=2)
    last = said.strip().splitlines()[-1]
    assert code == 2
    assert "; restart" not in said
    assert "the loss of block 2 is nan at step" in last
    assert "keeps the checkpoint of epoch 1" in last or "keeps the checkpoint of epoch 2, step" in last


LATE = """
import sys
import torch
from torch import nn

class Late(nn.Module):
    calls = 0

    def forward(self, x):
        self.calls += self.training
        if self.calls > {calls}:
            {fault}
        return x

def late(*, channels, size, classes):
    n = channels * size[0] * size[1]
    return nn.Sequential(nn.Flatten(), nn.Linear(n, 16), nn.ReLU(), nn.Linear(16, 16), Late(), nn.Linear(16, classes))
"""


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("raise RuntimeError('too late')", r": rank 1, block 1, minibatch \d+: too late \(own_late.py, line "),
        pytest.param(
            "1 / 0",
            r"rank 1, block 1, minibatch \d+: ZeroDivisionError: division by zero \(own_late.py, line ",
            marks=pytest.mark.long,
        ),
        pytest.param("sys.exit()", r"SystemExit \(own_late.py, line ", marks=pytest.mark.long),
    ],
)
def test_a_model_that_fails_late_ends_the_run_in_one_line(tmp_path, monkeypatch, launch, fault, words):
    (tmp_path / "own_late.py").write_text(LATE.format(calls=70, fault=fault))
    importable(tmp_path, monkeypatch)
    code, said = launch(tmp_path / "run", "--model=own_late:late", "--at", "3", "--epochs=3", processes=2)
    lines = [line for line in said.splitlines() if line.startswith("bll: ")]
    assert (code, len(lines)) == (2, 1), said
    assert "Traceback" not in said
    assert "model 'own_late:late' fails in training: " in lines[0]
    assert re.search(words, lines[0])
    assert "keeps the checkpoint of epoch 1" in lines[0]


def test_a_model_that_fails_while_blocks_are_placed_leaves_nothing(tmp_path, monkeypatch, launch):
    (tmp_path / "own_late.py").write_text(LATE.format(calls=3, fault="raise RuntimeError('too late')"))
    importable(tmp_path, monkeypatch)
    code, said = launch(tmp_path / "run", "--model=own_late:late", "--at", "1", "3", processes=2)
    assert (code, said.count("\n")) == (2, 1), said
    assert "model 'own_late:late' fails in training: RuntimeError: too late (own_late.py, line " in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--nnodes=2"], "--nnodes 2 needs --rdzv-endpoint"),
        (["--nnodes=0"], "--nnodes 0: write a number of machines"),
        (["--nnodes=3:2"], "--nnodes 3:2: write a number of machines"),
        (["--processes=-1"], "--processes -1"),
        (["--restarts=many"], "--restarts"),
        (["--nnodes=2", "--rdzv-endpoint=nowhere", "--interface=lo"], "write HOST:PORT"),
        (["--speed=3"], "--speed"),
        (["--lr=-1"], "--lr -1.0 is out of range"),
        (["--timeout=0"], "--timeout 0.0 is out of range"),
        (["--shard"], "--shard has an effect only with --replicas"),
        (["--replicas=2", "--shard", "--lookahead=both"], "--shard leaves no whole unit for --lookahead both"),
        (["--head=unembedding"], "--head unembedding copies the model's output layer, which another process"),
        (["--refresh=3"], "--refresh has an effect only with --lookahead frozen or both, or with --head unembedding"),
        (["--replicas=3"], "--replicas 3 is not a divisor of --batch-size"),
    ],
)
def test_unusable_options_start_nothing(tmp_path, capsys, args, words):
    out = tmp_path / "run"
    assert main(["launch", *args, f"--out={out}"]) == 2
    assert words in capsys.readouterr().err
    assert not out.exists()


def test_more_processes_than_blocks(tmp_path, launch):
    code, said = launch(tmp_path / "run", "--rule=bp", processes=2)
    assert code == 2
    assert "2 processes for 1 block" in said
    assert "rule bp trains the model whole" in said
    assert "; restart" not in said


def test_a_folder_that_is_in_use_is_left_alone(tmp_path, launch):
    with alone(tmp_path / "run"):
        code, said = launch(tmp_path / "run", processes=2)
        assert (code, said.count("\n")) == (2, 1), said
        assert f"is in use by process {os.getpid()} on " in said
        assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]


def test_unusable_settings_leave_no_folder(tmp_path, launch):
    code, said = launch(tmp_path / "new" / "run", "--batch-size=2000", processes=2)
    assert code == 2, said
    assert not list(tmp_path.iterdir())


def test_what_is_for_processes_needs_them(tmp_path, capsys):
    for option, value in (("--trace", ()), ("--message-dtype", ("bf16",)), ("--replicas", ("2",))):
        assert main(["train", option, *value, f"--out={tmp_path / 'run'}"]) == 2
        assert f"{option} is for blocks over processes: start with bll launch" in capsys.readouterr().err
