"""Checkpoints in parts: which cut counts, what is left when writing fails, and what fits a model."""

import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim import SGD
from torch.testing import assert_close

import blocklocal as bll
from blocklocal.alignment import Alignment
from blocklocal.lab.errors import UserError
from blocklocal.lab.runs.block_state import alignment_state, block_state, load_alignment_state, load_block_state
from blocklocal.lab.runs.checkpoint_part import State
from blocklocal.lab.runs.checkpoints import Checkpoints
from blocklocal.lab.training.rules import Problem, apply


def state(value: float = 0.0) -> State:
    torch.manual_seed(0)
    return {
        "weight": torch.randn(3, 4) + value,
        "map": torch.randn(2, 2, 3, 3).to(memory_format=torch.channels_last),
        "half": torch.randn(5).bfloat16(),
        "steps": torch.tensor(7),
        "nothing": torch.zeros(0),
        "random": torch.get_rng_state(),
        "seconds": 0.1 + value,
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
        assert loaded.pop("seconds") == expected.pop("seconds")
        assert_close(loaded, expected, rtol=0, atol=0)


def test_what_is_saved_is_as_it_was_then(tmp_path):
    weight = torch.zeros(1000)
    checkpoints = Checkpoints(tmp_path, blocks=1)
    checkpoints.save(1, {0: {"weight": weight}})
    weight += 1
    checkpoints.wait()
    assert_close(checkpoints.load(1, 0), {"weight": torch.zeros(1000)}, rtol=0, atol=0)


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
    (tmp_path / "step-10" / "block-0" / "index.json").unlink()
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


@contextmanager
def small_files(size: int) -> Iterator[None]:
    """No file can have more bytes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@contextmanager
def no_sync(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        yield


@pytest.mark.parametrize(
    ("failing", "words"),
    [
        (lambda patch: small_files(100), "File too large"),  # tensors do not fit
        (lambda patch: small_files(7000), "File too large"),  # nor does the index
        (lambda patch: no_sync(patch), "No space left on device"),
    ],
)
def test_what_cannot_be_written_is_said_and_leaves_the_last(tmp_path, monkeypatch, failing, words):
    checkpoints = saved(tmp_path, 5)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with failing(monkeypatch):
        checkpoints.save(10, {0: state(), 1: state() | {f"{i:0200}": i for i in range(40)}})
        with pytest.warns(UserWarning, match=f"{words}.*MiB are free.*training continues"):
            checkpoints.wait()
    assert checkpoints.latest() == 5
    assert [path.name for path in tmp_path.iterdir()] == ["step-5"]
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    checkpoints.save(15, {0: state(), 1: state()})
    checkpoints.wait()
    assert checkpoints.latest() == 15


def test_a_folder_that_cannot_be_made(tmp_path):
    checkpoints = saved(tmp_path, 5)
    (tmp_path / "step-10").write_text("a file")
    checkpoints.save(10, {0: state(), 1: state()})
    with pytest.warns(UserWarning, match=r"step-10.*training continues"):
        checkpoints.wait()
    assert checkpoints.latest() == 5
    assert (tmp_path / "step-10").read_text() == "a file"


def test_folders_that_are_no_cuts(tmp_path):
    checkpoints = saved(tmp_path, 5)
    others = ["step-07", "step-x", "step-", "step--9", "step-٩", "step-" + "9" * 200, "step-8.part"]
    for name in others:
        (tmp_path / name / "block-0").mkdir(parents=True)
    (tmp_path / "step-9").write_text("")
    assert checkpoints.latest() == 5
    checkpoints.discard_others(5)
    assert {path.name for path in tmp_path.iterdir()} == {*others, "step-5", "step-9"}


def test_a_checkpoint_of_an_older_version_is_neither_read_nor_thrown_away(tmp_path):
    for k in range(2):
        folder = tmp_path / "step-20" / f"block-{k}"
        folder.mkdir(parents=True)
        for name in (".metadata", "__0_0.distcp"):
            (folder / name).write_bytes(b"pickled")
    checkpoints = Checkpoints(tmp_path, blocks=2)
    assert checkpoints.latest() == 20
    with pytest.raises(UserError, match=r"older version.*resume with blocklocal 0\.1"):
        checkpoints.load(20, 0)


def test_a_tensor_that_files_do_not_hold(tmp_path):
    checkpoints = Checkpoints(tmp_path, blocks=1)
    checkpoints.save(1, {0: {"weight": torch.zeros(3, dtype=torch.complex128)}})
    with pytest.raises(UserError, match=r"cannot hold the state of this model.*torch\.complex128"):
        checkpoints.wait()
    assert not list(tmp_path.iterdir())


def test_nothing_is_pickled():
    package = Path(bll.__file__).parent
    weights = package / "lab" / "models" / "weights.py"  # the user's own file, of tensors alone
    assert weights.read_text().count("torch.load(") == weights.read_text().count("weights_only=True") == 1
    sources = [path for path in package.rglob("*.py") if path != weights]
    words = ("pickle.", "import pickle", "torch.load(", "torch.save(", "distributed.checkpoint", "weights_only")
    assert not [(path.name, word) for path in sources for word in words if word in path.read_text()]


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
        ({"width": 16}, r"of another shape or type: blocks\.0\.0\.bias, blocks\.0\.0\.weight"),
        ({"bias": False}, r"unknown: blocks\.0\.0\.bias"),
    ],
)
def test_the_state_of_another_model_is_refused(other, words):
    with pytest.raises(UserError, match=f"does not fit the model as it is built now.*{words}"):
        load_block_state(learner(**other), 0, None, block_state(learner(), 0, None))
    with pytest.raises(UserError, match=r"missing: blocks\.0\.0\.bias"):
        load_block_state(learner(), 0, None, block_state(learner(bias=False), 0, None))
    with pytest.raises(UserError, match=r"of another shape or type: blocks\.0\.0\.bias"):
        load_block_state(learner(), 0, None, block_state(learner().double(), 0, None))


def test_the_optimizer_of_another_model_is_refused():
    own = learner()
    optimizer, stored = SGD(own.block_parameters(0), 0.1, momentum=0.9), block_state(own, 0, None)
    for name, value in (
        ("momentum_buffer.blocks.0.7", torch.zeros(8)),
        ("momentum_buffer.blocks.0.0.bias", torch.zeros(7)),
    ):
        with pytest.raises(UserError, match=rf"does not fit the model.*the optimizer's {name}"):
            load_block_state(own, 0, optimizer, stored | {f"optimizer.{name}": value})


class Counted(nn.Linear):
    def get_extra_state(self) -> dict[str, int]:
        return {"calls": 3}

    def set_extra_state(self, state: dict[str, int]) -> None: ...


def test_a_module_that_keeps_something_else_is_named():
    with pytest.raises(UserError, match=r"blocks\.0\._extra_state of the model is a dict"):
        block_state(bll.BlockLocal([Counted(4, 3)], classes=3), 0, None)


@pytest.mark.parametrize("rule", ["fa", "usf", "brsf", "frsf", "dfa", "drtp"])
def test_feedback_goes_through_the_files(tmp_path, rule):
    """Whatever seed the other one was made with, and after steps that drew anew."""
    x, y = torch.randn(6, 4), torch.tensor([0, 1, 2, 0, 1, 2])

    def aligned(seed: int) -> Alignment:
        model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
        alignment = apply(rule, model, Problem(classes=3, example=x, blocks=1, seed=seed)).alignment
        assert alignment
        return alignment

    first, second, other = aligned(0), aligned(1), aligned(2)
    first.backward(x, y)
    checkpoints = Checkpoints(tmp_path, blocks=1)
    checkpoints.save(1, {0: alignment_state(first) | {"weight": x}})
    checkpoints.wait()
    load_alignment_state(second, checkpoints.load(1, 0))
    assert_close(second.feedback, first.feedback, rtol=0, atol=0)
    second.model.load_state_dict(first.model.state_dict())
    for each in (first, second):
        each.model.zero_grad()
        each.backward(x, y)
    assert_close(*([p.grad for p in each.model.parameters()] for each in (first, second)), rtol=0, atol=0)
    with pytest.raises(UserError, match=r"does not fit the model.*is of another"):
        load_alignment_state(other, checkpoints.load(1, 0) | {"alignment.rule": "another"})
    with pytest.raises(UserError, match=r"does not fit the model.*without a name"):
        load_alignment_state(other, {"weight": x})
