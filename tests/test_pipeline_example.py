"""The example of a pipeline, under torchrun as its first line says."""

import os
import subprocess
import sys
from pathlib import Path

EXAMPLE = Path(__file__).parent.parent / "examples" / "pipeline.py"


def test_two_processes_learn_the_digits() -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(EXAMPLE)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment)
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines() if line.startswith("epoch 10 ")]
    assert {(line[3], line[5]) for line in lines} == {("0", "0:"), ("0", "1:"), ("1", "2:"), ("1", "3:")}
    assert all(float(line[-1]) > 0.85 for line in lines)
