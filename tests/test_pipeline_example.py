"""The example of a pipeline, under torchrun as its first line says."""

import os
import re
import subprocess
import sys
from pathlib import Path

EXAMPLE = Path(__file__).parent.parent / "examples" / "pipeline.py"


def test_two_processes_learn_the_digits() -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(EXAMPLE)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment)
    assert done.returncode == 0, done.stderr
    said = re.findall(r"epoch 10 rank (\d) block (\d): loss \d+\.\d+ accuracy (\d\.\d+)", done.stdout)  # lines may mix
    assert {(rank, block) for rank, block, _ in said} == {("0", "0"), ("0", "1"), ("1", "2"), ("1", "3")}
    assert all(float(accuracy) > 0.85 for _, _, accuracy in said)
