"""Standard output and standard error that are closed, full or take ASCII alone: no traceback, the model is saved."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from run_folders import write_run

BLL = [sys.executable, "-m", "blocklocal"]
SETTINGS = ["--model=mlp", "--epochs=1", "--train-size=128", "--test-size=50", "--out=run"]
TRAIN = [*BLL, "train", *SETTINGS]
LAUNCH = [*BLL, "launch", "--processes=2", "--blocks=2", *SETTINGS]
FULL = Path("/dev/full")
needs_full = pytest.mark.skipif(not FULL.exists(), reason="needs Linux")


@needs_full
@pytest.mark.parametrize(
    "ending",
    [
        "2>/dev/full",
        pytest.param("2>&-", marks=pytest.mark.long),
        pytest.param("2>&1 >/dev/null | true", marks=pytest.mark.long),
        ">&- 2>&-",
    ],
)
def test_training_needs_nobody_who_listens(tmp_path: Path, ending: str) -> None:
    command = f"{' '.join(TRAIN)} {ending}; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "run" / "model.safetensors").exists()


@needs_full
def test_processes_need_nobody_who_listens(tmp_path: Path) -> None:
    command = f"{' '.join(LAUNCH)} 2>/dev/full"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert done.returncode == 0
    assert "Traceback" not in done.stdout
    assert (tmp_path / "run" / "model.safetensors").exists()
    for log in (tmp_path / "run" / "logs").iterdir():
        assert "Traceback" not in log.read_text()


@needs_full
@pytest.mark.parametrize(
    ("ending", "said"), [(">/dev/full", "No space left"), pytest.param("| true", "", marks=pytest.mark.long)]
)
def test_results_that_cannot_be_written(tmp_path: Path, ending: str, said: str) -> None:
    write_run(tmp_path / "runs", accuracies=[0.5, 0.6])
    command = f"{' '.join(BLL)} report runs {ending}; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    assert said in done.stderr
    assert done.stderr.count("\n") == (1 if said else 0)
    assert (tmp_path / "runs" / "report" / "report.html").exists()


def test_an_output_of_ascii_alone(tmp_path: Path) -> None:
    for seed in (0, 1):
        write_run(tmp_path / "runs" / str(seed), seed=seed, data="näme", accuracies=[0.5, 0.6 + 0.1 * seed])
    command = [*BLL, "report", "runs"]
    ascii_alone = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, encoding="ascii", env=ascii_alone)
    assert (done.returncode, done.stderr) == (0, "")
    assert "n\\xe4me, resnet20 (2 runs)" in done.stdout
    assert "65.00 +- 7.07" in done.stdout
