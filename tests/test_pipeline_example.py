"""The examples of pipelines: one under torchrun as their first lines say, the other in processes that torch is in."""

import contextlib
import io
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import processes
import pytest
import torch.distributed as dist

EXAMPLES = Path(__file__).parent.parent / "examples"
TORCHRUN = ["--standalone", "--nproc-per-node", "2"]


@pytest.mark.parametrize("example", ["pipeline.py", "uneven_devices.py"])
def test_the_first_line_is_the_command(example: str) -> None:
    first, *_ = (EXAMPLES / example).read_text().splitlines()
    assert f"`torchrun {' '.join(TORCHRUN)} examples/{example}`" in first


def test_two_processes_learn_the_digits() -> None:
    command = [sys.executable, "-m", "torch.distributed.run", *TORCHRUN, str(EXAMPLES / "pipeline.py")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment)
    assert done.returncode == 0, done.stderr
    said = re.findall(r"epoch 10 rank (\d) block (\d): loss \d+\.\d+ accuracy (\d\.\d+)", done.stdout)  # lines may mix
    assert {(rank, block) for rank, block, _ in said} == {("0", "0"), ("0", "1"), ("1", "2"), ("1", "3")}
    assert all(float(accuracy) > 0.85 for _, _, accuracy in said)


def uneven_devices(rank: int) -> list[str]:
    """What it prints, in the group that is there."""
    example = runpy.run_path(str(EXAMPLES / "uneven_devices.py"))
    dist.init_process_group = lambda backend: None
    dist.destroy_process_group = lambda: None
    with contextlib.redirect_stdout(io.StringIO()) as said:
        example["main"](8)
    return said.getvalue().splitlines()


@pytest.mark.skipif(
    not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) < 2, reason="processes cannot have their cores"
)
def test_blocks_are_placed_evenly_and_as_measured(tmp_path: Path) -> None:
    _, said = processes.run(uneven_devices, processes=2, folder=tmp_path)
    found = re.findall(r"(.*): blocks on ranks \(([01, ]+)\), \d", "\n".join(said))
    assert [name for name, _ in found] == ["even", "as measured"]
    even, measured = ([int(rank) for rank in ranks.split(", ")] for _, ranks in found)
    assert even == [0] * 5 + [1] * 4
    assert measured == sorted(measured)
    assert len(measured) == 9
    assert set(measured) == {0, 1}
