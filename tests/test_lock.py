"""One process at a time writes in a folder: others are told at once, and a kill leaves nothing that stops the next."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from blocklocal.lab import cli
from blocklocal.lab.errors import UserError
from blocklocal.lab.runs.lock import MOMENT, alone, clear, holder, is_held
from blocklocal.lab.settings import Settings
from blocklocal.lab.training.run import train

SMALL = ["--model=mlp", "--train-size=128", "--test-size=50", "--epochs=1"]
HOLD = """
import sys, time, pathlib
from blocklocal.lab.runs.lock import alone
with alone(pathlib.Path(sys.argv[1])):
    """


@pytest.fixture
def held(tmp_path):
    """A folder that another process holds, and that process."""
    folder = tmp_path / "held"
    code = HOLD + "print('held', flush=True); time.sleep(600)"
    process = subprocess.Popen([sys.executable, "-c", code, str(folder)], stdout=subprocess.PIPE, text=True)
    assert process.stdout
    assert process.stdout.readline() == "held\n"
    yield folder, process
    process.kill()
    process.communicate()


def test_the_second_is_told_who_the_first_is(held):
    folder, process = held
    assert is_held(folder)
    words = rf"^'{folder}' is in use by process {process.pid} on .*--out$"
    with pytest.raises(UserError, match=words), alone(folder, timeout=0.05):
        pass
    assert is_held(folder)


def test_a_kill_lets_go(held):
    folder, process = held
    process.kill()
    with alone(folder, timeout=30):
        assert holder(folder).startswith(f"process {os.getpid()} on ")
    assert not is_held(folder)
    assert not list(folder.iterdir())


def test_what_holds_it_may_say_anything(tmp_path):
    (tmp_path / ".lock").write_text("process 1 on \x1b[31m[red]")
    assert holder(tmp_path) == "another process"
    with alone(tmp_path):
        assert is_held(tmp_path)


def test_a_file_of_a_killed_process_is_cleared_and_that_of_another_is_not(tmp_path):
    (tmp_path / ".lock").write_text("process 1 on here")
    clear(tmp_path)
    assert not list(tmp_path.iterdir())
    with alone(tmp_path):
        clear(tmp_path)
        assert is_held(tmp_path)


def test_what_was_made_for_nothing_is_taken_away(tmp_path):
    folder = tmp_path / "a" / "b" / "c"
    with alone(folder):
        assert folder.is_dir()
    assert not list(tmp_path.iterdir())
    with alone(folder):
        (folder.parent / "result").touch()
    assert [path.name for path in tmp_path.rglob("*")] == ["a", "b", "result"]


def test_never_two_at_once(tmp_path):
    """Each makes the folder and takes it away again, while the others try to enter."""
    folder, inside, most, entries = tmp_path / "folder", 0, 0, 0

    def enter() -> None:
        nonlocal inside, most, entries
        for _ in range(30):
            with alone(folder, timeout=60):
                inside += 1
                most, entries = max(most, inside), entries + 1
                time.sleep(0.0002)
                inside -= 1

    threads = [threading.Thread(target=enter) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (most, entries) == (1, 180)
    assert not list(tmp_path.rglob(".lock"))


@pytest.mark.parametrize(
    ("command", "folder"),
    [
        (["train", *SMALL], ""),
        (["train", *SMALL, "--resume"], ""),
        (["compare", *SMALL, "--rules=bll", "--seeds=1"], ""),
        (["table1", "--rules=bll", "--datasets=cifar10", "--seeds=1"], ""),
        (["demo", "--epochs=1"], ""),
        (["demo", "--epochs=1"], "bll"),
    ],
)
def test_commands_leave_a_folder_that_is_in_use_alone(tmp_path, capsys, command, folder):
    run = tmp_path / "run"
    if "--resume" in command:
        assert cli.main(["train", *SMALL, f"--out={run}"]) == 0
    capsys.readouterr()
    with alone(run / folder):
        before = {path: path.is_file() and path.read_bytes() for path in run.rglob("*")}
        assert cli.main([*command, f"--out={run}"]) == 2
        out, err = capsys.readouterr()
        assert err.count("\n") == 1, err
        assert f"'{run / folder}' is in use by process {os.getpid()} on " in err
        assert out == ""
        assert {path: path.is_file() and path.read_bytes() for path in run.rglob("*")} == before


def test_after_a_restart_the_process_before_has_time_to_end(tmp_path, monkeypatch):
    entered, settings = threading.Event(), Settings(model="mlp", epochs=1, train_size=128, out=str(tmp_path / "run"))

    def linger() -> None:
        with alone(tmp_path / "run"):
            entered.set()
            time.sleep(2 * MOMENT)

    thread = threading.Thread(target=linger)
    thread.start()
    entered.wait()
    with pytest.raises(UserError, match="in use by"):
        train(settings)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert train(settings)["epochs"] == 1
    thread.join()


def test_two_that_start_at_once(tmp_path):
    command = [sys.executable, "-m", "blocklocal", "train", *SMALL, f"--out={tmp_path / 'run'}"]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate() for process in both]
    (first,) = (text for process, text in zip(both, said, strict=True) if process.returncode == 0)
    (second,) = (text for process, text in zip(both, said, strict=True) if process.returncode == 2)
    assert json.loads(first[0])["epochs"] == 1
    assert second[0] == ""
    assert second[1].count("\n") == 1
    assert "is in use by process" in second[1] or "already holds a run" in second[1]
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 1


def test_a_killed_run_leaves_a_lock_that_stops_nobody(tmp_path):
    run = tmp_path / "run"
    command = [sys.executable, "-m", "blocklocal", "train", *SMALL[:-1], "--epochs=200", f"--out={run}"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not Path(run, "metrics.jsonl").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (run / ".lock").exists()
    with alone(run):
        pass
    assert not (run / ".lock").exists()
