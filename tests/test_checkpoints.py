"""Checkpoints in parts: which cut counts, what is never read, and what is left when writing fails."""

import os
import pickle
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim import SGD

import blocklocal as bll
from blocklocal.lab.checkpoints import Checkpoints
from blocklocal.lab.errors import UserError
from blocklocal.lab.state import block_state, load_block_state, pack, unpack


def state(value: float = 0.0) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {
        "weight": torch.randn(3, 4) + value,
        "map": torch.randn(2, 2, 3, 3).to(memory_format=torch.channels_last),
        "half": torch.randn(5).bfloat16(),
        "steps": torch.tensor(7),
        "nothing": torch.zeros(0),
        "random": torch.get_rng_state(),
    }


def saved(path: Path, *cuts: int) -> Checkpoints:
    """Both blocks of two, at each of these minibatches."""
    checkpoints = Checkpoints(path, blocks=2)
    for step in cuts:
        checkpoints.save(step, {0: state(step), 1: state(-step)})
    checkpoints.wait()
    return checkpoints


def test_what_was_saved_is_loaded_and_the_last_is_kept(tmp_path):
    checkpoints = saved(tmp_path, 5, 10)
    assert checkpoints.latest() == 10
    assert [path.name for path in tmp_path.iterdir()] == ["step-10"]
    for k, sign in ((0, 1), (1, -1)):
        loaded, expected = checkpoints.load(10, k), state(sign * 10)
        assert loaded.keys() == expected.keys()
        assert all(torch.equal(loaded[name], tensor) for name, tensor in expected.items())
        assert all(loaded[name].dtype == tensor.dtype for name, tensor in expected.items())


def test_what_is_saved_is_as_it_was_then(tmp_path):
    weight = torch.zeros(1000)
    checkpoints = Checkpoints(tmp_path, blocks=1)
    checkpoints.save(1, {0: {"weight": weight}})
    weight += 1
    checkpoints.wait()
    assert not checkpoints.load(1, 0)["weight"].any()


def test_a_cut_counts_once_every_block_is_whole(tmp_path):
    first, second = (Checkpoints(tmp_path, blocks=2) for _ in range(2))  # two processes, a block each
    for step in (5, 10, 15):
        first.save(step, {0: state()})
        first.wait()
    assert first.latest() is None
    second.save(5, {1: state()})
    second.wait()
    assert first.latest() == second.latest() == 5, "the first is ahead, and has kept what the second may need"
    second.save(10, {1: state()})
    second.wait()
    (tmp_path / "step-10" / "block-0" / ".metadata").unlink()
    assert second.latest() is None, "as if killed before the rename"


def test_a_cut_that_is_needed_stays_until_the_next_is_whole(tmp_path):
    first, second = (Checkpoints(tmp_path, blocks=2) for _ in range(2))
    for checkpoints, k in ((first, 0), (second, 1)):
        checkpoints.save(5, {k: state()})
        checkpoints.wait()
    first.save(10, {0: state()})
    first.wait()
    assert first.latest() == 5
    second.save(10, {1: state()})
    second.wait()
    assert second.latest() == 10
    assert (tmp_path / "step-5" / "block-0").exists(), "nobody takes away what is another's"
    first.discard_others(10)
    assert [path.name for path in tmp_path.iterdir()] == ["step-10"]


class Trap:
    def __reduce__(self):
        return os.mkdir, ("trapped",)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "Ran out of input"),
        (b"half a file", "not a readable checkpoint"),
        (pickle.dumps({}), "a dict in place of metadata"),
        (pickle.dumps(Trap()), r"wants to make a posix.mkdir"),
        (b'cbuiltins\nexec\n(S\'open("trapped", "w")\'\ntR.', "wants to make a builtins.exec"),
    ],
)
def test_metadata_makes_nothing_but_metadata(tmp_path, monkeypatch, content, words):
    monkeypatch.chdir(tmp_path)
    checkpoints = saved(tmp_path, 5)
    (tmp_path / "step-5" / "block-1" / ".metadata").write_bytes(content)
    with pytest.raises(UserError, match=words):
        checkpoints.load(5, 1)
    assert not Path("trapped").exists()


def test_tensors_are_read_without_unpickling(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    checkpoints = Checkpoints(tmp_path, blocks=1)
    checkpoints.save(1, {0: {"weight": torch.zeros(500)}})
    checkpoints.wait()
    file = tmp_path / "step-1" / "block-0" / "__0_0.distcp"
    trap = tmp_path / "trap"
    torch.save(Trap(), trap)
    file.write_bytes(trap.read_bytes().ljust(file.stat().st_size, b"\0"))
    with pytest.raises(UserError, match="not a readable checkpoint"):
        checkpoints.load(1, 0)
    assert not Path("trapped").exists()
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(UserError, match="not a readable checkpoint"):
        checkpoints.load(1, 0)


def test_what_cannot_be_written_is_said_and_leaves_the_last(tmp_path, monkeypatch):
    checkpoints = saved(tmp_path, 5)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        checkpoints.save(10, {0: state(), 1: state()})
        with pytest.warns(UserWarning, match="No space left on device.*training goes on"):
            checkpoints.wait()
    assert checkpoints.latest() == 5
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    checkpoints.save(15, {0: state(), 1: state()})
    checkpoints.wait()
    assert checkpoints.latest() == 15


def learner(*, width: int = 8, bias: bool = True) -> bll.BlockLocal:
    blocks = [nn.Sequential(nn.Linear(4, width, bias=bias), nn.BatchNorm1d(width)), nn.Linear(width, 3)]
    return bll.BlockLocal(blocks, classes=3, example=torch.randn(5, 4))


def test_the_state_of_a_block_is_all_that_it_needs():
    x, y = torch.randn(6, 4), torch.tensor([0, 1, 2, 0, 1, 2])
    first, second = learner(), learner()
    optimizers = [[SGD(each.block_parameters(k), 0.1, momentum=0.9) for k in range(2)] for each in (first, second)]
    for _ in range(3):
        first.backward(x, y, optimizers=optimizers[0])
    for k in range(2):
        load_block_state(second, k, optimizers[1][k], block_state(first, k, optimizers[0][k]))
    for each, own in zip((first, second), optimizers, strict=True):
        each.backward(x, y, optimizers=own)
    assert all(
        torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"width": 16}, "size mismatch"),
        ({"bias": False}, r"unknown: blocks\.0\.0\.bias"),
    ],
)
def test_the_state_of_another_model_is_refused(other, words):
    with pytest.raises(UserError, match=f"(?s)does not fit the model as it is built now.*{words}"):
        load_block_state(learner(**other), 0, None, block_state(learner(), 0, None))
    with pytest.raises(UserError, match=r"missing: blocks\.0\.0\.bias"):
        load_block_state(learner(), 0, None, block_state(learner(bias=False), 0, None))


def test_what_is_packed_is_unpacked():
    values = {"seed": 7, "name": "usf", "feedback": {"layer": torch.randn(2, 3)}, "random": torch.get_rng_state()}
    found = unpack(pack(values))
    assert found.keys() == values.keys()
    assert torch.equal(found["feedback"]["layer"], values["feedback"]["layer"])
    with pytest.raises(pickle.UnpicklingError):
        unpack(pack({"trap": Trap()}))
