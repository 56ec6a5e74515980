"""The examples of pipelines, under torchrun as their first lines say."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


def output(example: str, *arguments: str) -> str:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    command = [*torchrun, str(EXAMPLES / example), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_two_processes_learn_the_digits() -> None:
    said = re.findall(
        r"epoch 10 rank (\d) block (\d): loss \d+\.\d+ accuracy (\d\.\d+)", output("pipeline.py")
    )  # lines may mix
    assert {(rank, block) for rank, block, _ in said} == {("0", "0"), ("0", "1"), ("1", "2"), ("1", "3")}
    assert all(float(accuracy) > 0.85 for _, _, accuracy in said)


@pytest.mark.skipif(
    not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) < 2, reason="processes cannot have their cores"
)
def test_blocks_are_placed_evenly_and_as_measured() -> None:
    found = re.findall(r"(.*): blocks on ranks \(([01, ]+)\), \d", output("uneven_devices.py", "8"))
    assert [name for name, _ in found] == ["even", "as measured"]
    even, measured = ([int(rank) for rank in ranks.split(", ")] for _, ranks in found)
    assert even == [0] * 5 + [1] * 4
    assert measured == sorted(measured)
    assert len(measured) == 9
    assert set(measured) == {0, 1}
