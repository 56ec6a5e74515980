"""A model several times larger than the memory that the system allows learns from files, and not by backpropagation."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.long
def test_a_decoder_learns_in_a_fifth_of_its_memory(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("a rose is a rose is a rose. " * 50)
    command = [sys.executable, ROOT / "benchmarks/offload.py", tmp_path / "text", "--ways", "files,backprop"]
    sizes = {"width": 384, "depth": 14, "blocks": 14, "heads": 4, "context": 16, "steps": 2, "limit": 72}
    options = [word for name, value in sizes.items() for word in (f"--{name}", str(value))]
    ended = subprocess.run([*command, *options, "--folder", tmp_path], capture_output=True, text=True, cwd=ROOT)
    files, backprop = map(json.loads, ended.stdout.splitlines())
    assert files["exit"] == 0, ended.stderr
    assert files["all_mib"] > 5 * sizes["limit"]
    assert files["peak_beyond_mib"] < sizes["limit"]
    assert files["blocks_that_learn"] == 14
    assert backprop["exit"] != 0
    assert backprop["exit"] == -9 or "can't allocate memory" in ended.stderr
