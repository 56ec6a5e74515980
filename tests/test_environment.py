"""Where a run computes: how a process treats its memory."""

import subprocess
import sys

import pytest

# Blocks that together are more than glibc keeps of its own accord.
PROGRAM = """
import resource, torch
from blocklocal.lab.environment import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [torch.ones(4 * 2**20) for _ in range(8)]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

keep_freed_memory()
print(*[faults() for _ in range(5)])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="page faults are those of Linux")
def test_memory_that_was_freed_is_taken_again_without_page_faults() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True, timeout=120)
    first, *later = map(int, done.stdout.split())
    assert max(later) < first / 4  # of eight blocks one may not fit into where it was, for its alignment
