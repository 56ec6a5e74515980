"""Tensors whose memory is in files: the same values to the bit, little of it resident, nothing left."""

import errno
import gc
import os
from pathlib import Path

import pytest
import torch
from torch import nn

from blocklocal.lab.errors import UserError
from blocklocal.lab.training import file_memory
from blocklocal.lab.training.file_memory import FileMemory


def trained() -> tuple[dict, dict, torch.Tensor]:
    """The state of a model after two steps, that of its optimizer, and the random state."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(512, 10)
    ).to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    model[3:].append(nn.LogSoftmax(1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for _ in range(2):
        x, y = torch.randn(4, 3, 8, 8), torch.randint(10, (4,))
        nn.functional.cross_entropy(nn.functional.dropout(model(x), 0.5), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.state_dict(), optimizer.state_dict()["state"], torch.get_rng_state()


def test_what_is_computed_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_memory, "LARGE", 1)
    monkeypatch.setattr(file_memory, "RESIDENT", 2**18)
    expected, memory = trained(), FileMemory(tmp_path)
    with memory:
        found = trained()
        assert memory._mapped
    torch.testing.assert_close(found, expected, rtol=0, atol=0, check_stride=True)
    del found
    gc.collect()
    assert not memory._mapped
    assert not list(tmp_path.iterdir())


def test_views_share_memory_as_they_do_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_memory, "LARGE", 1)
    with FileMemory(tmp_path):
        whole = torch.arange(6.0).view(2, 3)
        row, column = whole[1], whole.t()[2]
        again = torch.empty(0).set_(whole)  # pyright: ignore[reportArgumentType]
        row.mul_(2)
    column[0] = 7
    assert whole.tolist() == [[0, 1, 7], [6, 8, 10]]
    assert again.tolist() == whole.tolist()


def test_other_views_than_plain_ones_are_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_memory, "LARGE", 1)
    with FileMemory(tmp_path):
        number, sparse = torch.tensor([1 + 2j]), torch.eye(2).to_sparse().coalesce()
        conjugate = number.conj()
        conjugate.conj().mul_(2)
        sparse.values().mul_(3)
    assert (number.tolist(), conjugate.tolist(), conjugate.imag.tolist()) == ([2 + 4j], [2 - 4j], [-4])
    assert sparse.to_dense().tolist() == [[3, 0], [0, 3]]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_little_is_resident(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_memory, "RESIDENT", 2**20)
    before = resident()
    with FileMemory(tmp_path):
        found = [torch.full((2**22,), float(i)) for i in range(6)]
    assert resident() - before < 48
    assert [float(tensor[-1]) for tensor in found] == list(range(6))


def resident() -> float:
    """In MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1024


def test_a_full_disk_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    said = r"cannot hold the model while it is built \(No space left on device; "
    with pytest.raises(UserError, match=said), FileMemory(tmp_path / "none"):
        torch.zeros(2**20)
    assert not list(tmp_path.iterdir())
