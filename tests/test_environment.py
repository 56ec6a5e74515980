"""Where a run computes: how a process treats its memory."""

import subprocess
import sys

import pytest

# A block that is larger than any that glibc keeps of its own accord.
PROGRAM = """
import resource, torch
from blocklocal.lab.environment import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(10 * 2**20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

keep_freed_memory()
print(*[faults() for _ in range(5)])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="page faults are those of Linux")
def test_memory_that_was_freed_is_taken_again_without_page_faults() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True, timeout=120)
    first, _, *later = map(int, done.stdout.split())  # of the second the first bytes may be too few, for alignment
    assert max(later) < first / 10
