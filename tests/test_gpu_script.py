"""`make gpu` on a CPU, every row in seconds: what is kept, what is passed over, and what goes on."""

import json
import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "gpu.py"


def run(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), "--tiny", f"--out={folder / 'out'}", f"--work={folder / 'work'}", *options]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )


def test_rows_are_kept_and_done_once_and_what_was_cut_off_goes_on(tmp_path):
    rows = ("--only=gpu-cifar10-resnet50", "--at-once=2")
    late = run(tmp_path, *rows, "--minutes=0")
    assert late.returncode == 1
    assert "2 of 2 rows are missing" in late.stdout
    assert list((tmp_path / "out").iterdir()) == []
    done = run(tmp_path, *rows)
    assert done.returncode == 0, done.stdout + done.stderr
    kept = sorted((tmp_path / "out").iterdir())
    assert [row.name for row in kept] == [f"gpu-cifar10-resnet50-{rule}-seed0" for rule in ("bll", "bp")]
    assert {file.name for file in kept[0].iterdir()} == {"config.json", "metrics.jsonl"}
    before = {file: file.stat().st_mtime_ns for row in kept for file in row.iterdir()}
    again = run(tmp_path, *rows)
    assert (again.returncode, again.stdout) == (0, "")
    assert before == {file: file.stat().st_mtime_ns for row in kept for file in row.iterdir()}
    for file in kept[1].iterdir():  # as if the run had been cut off before it was kept
        file.unlink()
    kept[1].rmdir()
    assert run(tmp_path, *rows).returncode == 0
    assert "nothing is left to train" in (tmp_path / "work" / f"{kept[1].name}.log").read_text()


def test_a_bench_keeps_its_command(tmp_path):
    done = run(tmp_path, "--only=bench-resnet110")
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "out" / "bench-resnet110.json").read_text())
    assert found["command"].startswith("bench --model mlp")
    assert found["rules"].keys() == {"bp", "bll"}
