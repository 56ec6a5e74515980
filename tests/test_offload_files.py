"""Blocks in files: interrupted and resumed is undisturbed, whatever ends the process; a full disk loses nothing."""

from __future__ import annotations

import resource
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import blocklocal as bll
from blocklocal.offload import Offloaded
from blocklocal.offload.files import INDEX
from blocklocal.offload.tensor_file import read, write

ADAMW = partial(torch.optim.AdamW, lr=1e-2)
X, Y = torch.randn(12, 8, generator=torch.Generator().manual_seed(1)), torch.arange(12) % 3


def built(folder: Path, *, resume: bool = False, device: str = "meta", optimizer=ADAMW, width: int = 16, **settings):
    torch.manual_seed(2)
    with torch.device(device):
        units = [nn.Sequential(nn.Linear(n, width), nn.BatchNorm1d(width), nn.Dropout(0.1)) for n in (8, width)]
        model = nn.Sequential(*units, nn.Linear(width, 3))
        learner = bll.BlockLocal(model, classes=3, example=torch.randn(4, 8), **settings)
    torch.manual_seed(3)
    return learner, learner.offload(bll.FileStore(folder), optimizer=optimizer, resume=resume)


def ended(offloaded: Offloaded) -> dict[str, Any]:
    """The state of everything after the end, with which another run is compared."""
    learner = offloaded._chain
    assert isinstance(learner, bll.BlockLocal)
    closed(offloaded, end=True)
    kept = {f"optimizer {k}": one.state_dict() for k, one in enumerate(offloaded.optimizers) if one is not None}
    return {"weights": learner.state_dict(), **kept}


def closed(offloaded: Offloaded, *, end: bool = False) -> None:
    if end:
        offloaded.end()
    store = offloaded._store
    assert isinstance(store, bll.FileStore)
    store.close()


def assert_equal(one: Any, other: Any) -> None:
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_equal(one[key], other[key])
    elif isinstance(one, list):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            assert_equal(a, b)
    else:
        assert one == other


def schedules(offloaded: Offloaded) -> list[torch.optim.lr_scheduler.LambdaLR]:
    optimizers = [one for one in offloaded.optimizers if one is not None]
    return [torch.optim.lr_scheduler.LambdaLR(one, lambda step: 0.9**step) for one in optimizers]


def train(
    learner: bll.BlockLocal, offloaded: Offloaded, rates: list, *, begin: int, end: int, save_at: int = -1
) -> None:
    for step in range(begin, end):
        learner.backward(X, Y, optimizers=offloaded.optimizers)
        for rate in rates:
            rate.step()
        if step + 1 == save_at:
            progress = {
                "step": save_at,
                "random": torch.get_rng_state(),
                "rates": [rate.state_dict() for rate in rates],
            }
            offloaded.save(progress)


def resumed(folder: Path, **settings) -> tuple[bll.BlockLocal, Offloaded, list, int]:
    """The run as it was saved, as a user's script would restore it."""
    learner, offloaded = built(folder, resume=True, **settings)
    rates = schedules(offloaded)
    for rate, state, one in zip(rates, offloaded.progress["rates"], offloaded.optimizers, strict=True):
        rate.load_state_dict(state)
        assert one is not None
        for group, value in zip(one.param_groups, rate.get_last_lr(), strict=True):
            group["lr"] = value
    torch.set_rng_state(offloaded.progress["random"])
    return learner, offloaded, rates, offloaded.progress["step"]


def undisturbed(folder: Path, **settings) -> dict[str, Any]:
    learner, offloaded = built(folder, **settings)
    train(learner, offloaded, schedules(offloaded), begin=0, end=6)
    return ended(offloaded)


@pytest.mark.parametrize("device", ["meta", "cpu"])
@pytest.mark.parametrize(
    "optimizer", [ADAMW, partial(torch.optim.SGD, lr=0.1, momentum=0.9), partial(torch.optim.Adagrad, lr=0.1)], ids=str
)
def test_interrupted_and_resumed_is_undisturbed(tmp_path: Path, device: str, optimizer) -> None:
    expected = undisturbed(tmp_path / "whole", device=device, optimizer=optimizer)
    learner, offloaded = built(tmp_path / "cut", device=device, optimizer=optimizer)
    train(learner, offloaded, schedules(offloaded), begin=0, end=5, save_at=3)  # two steps are lost
    closed(offloaded)
    learner, offloaded, rates, step = resumed(tmp_path / "cut", device=device, optimizer=optimizer)
    assert step == 3
    train(learner, offloaded, rates, begin=step, end=6)
    assert_equal(ended(offloaded), expected)


SCRIPT = """
import os, signal, sys
from pathlib import Path

sys.path.insert(0, sys.argv[1])
import torch
from blocklocal.offload import files, tensor_file
from test_offload_files import built, schedules, train

torch.set_num_threads(1)
folder, where, left = Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
learner, offloaded = built(folder)
rates = schedules(offloaded)
train(learner, offloaded, rates, begin=0, end=3, save_at=3)

def dying(function):
    def then(*args, **kwargs):
        global left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)
    return then

if where == "tensor":
    tensor_file._memory = dying(tensor_file._memory)
elif where == "flush":
    files._flush = dying(files._flush)
else:
    Path.replace = dying(Path.replace)
train(learner, offloaded, rates, begin=3, end=5, save_at=4)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("where", "left", "step"),
    [
        ("tensor", 20, 3),
        pytest.param("replace", 1, 3, marks=pytest.mark.long),
        ("flush", 9, 3),
        pytest.param("flush", 10, 4, marks=pytest.mark.long),
    ],
)
def test_a_process_killed_while_it_writes_loses_nothing(tmp_path: Path, where: str, left: int, step: int) -> None:
    command = [sys.executable, "-c", SCRIPT, str(Path(__file__).parent), str(tmp_path / "cut"), where, str(left)]
    killed = subprocess.run(command, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    learner, offloaded, rates, found = resumed(tmp_path / "cut")
    assert found == step
    train(learner, offloaded, rates, begin=step, end=6)
    assert_equal(ended(offloaded), undisturbed(tmp_path / "whole"))


@contextmanager
def files_up_to(size: int) -> Iterator[None]:
    """As on a disk that is full, for files of more than this size."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_full_disk_loses_nothing(tmp_path: Path) -> None:
    expected = undisturbed(tmp_path / "whole")
    learner, offloaded = built(tmp_path / "full")
    rates = schedules(offloaded)
    train(learner, offloaded, rates, begin=0, end=6, save_at=5)
    before = sorted(path.name for path in (tmp_path / "full").iterdir())
    with files_up_to(100):
        with pytest.raises(
            OSError, match=r"full' cannot be written \(.*MiB are free\): the block stays in memory"
        ) as caught:
            learner.eval().exits(X)
        assert "\n" not in str(caught.value)
        with pytest.raises(OSError, match="cannot be written"):
            offloaded.save()
    assert sorted(path.name for path in (tmp_path / "full").iterdir()) == before
    assert offloaded.optimizers[2] is not None
    assert_equal(ended(offloaded), expected)
    assert resumed(tmp_path / "full")[3] == 5


def test_a_learner_is_as_it_was_where_the_disk_is_full_at_once(tmp_path: Path) -> None:
    with files_up_to(100), pytest.raises(OSError, match="cannot be written"):
        built(tmp_path / "full", device="cpu")
    assert not list((tmp_path / "full").glob("*.safetensors"))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-4])


def lengthen(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"0000")


def spoil(path: Path) -> None:
    path.write_bytes(b"something else, which is long enough to be a header")


def name_others(path: Path) -> None:
    write(path, {"other": torch.empty(3, device="meta")}, [torch.zeros(3)])


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (truncate, "block-1"),
    "too long": (lengthen, "optimizer-1"),
    "empty": (lambda path: path.write_bytes(b""), "block-1"),
    "foreign": (spoil, "block-1"),
    "missing": (Path.unlink, "optimizer-0"),
    "index truncated": (truncate, INDEX),
    "index foreign": (spoil, INDEX),
    "index of another version": (lambda path: path.write_text(path.read_text().replace("1", "2", 1)), INDEX),
    "index of other files": (lambda path: path.write_text(path.read_text().replace("block-0.", "../0.")), INDEX),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_files_are_refused_in_one_line_before_anything_changes(tmp_path: Path, name: str) -> None:
    damage, file = DAMAGE[name]
    learner, offloaded = built(tmp_path / "run")
    train(learner, offloaded, schedules(offloaded), begin=0, end=2, save_at=2)
    closed(offloaded)
    (path,) = (tmp_path / "run").glob(f"{file}*")
    damage(path)
    with pytest.raises(ValueError, match=r"is not what was written there") as caught:
        built(tmp_path / "run", resume=True)
    assert path.name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_tensors_of_another_file_are_refused(tmp_path: Path) -> None:
    learner, offloaded = built(tmp_path / "run")
    train(learner, offloaded, [], begin=0, end=2, save_at=2)
    (path,) = (tmp_path / "run").glob("block-0*")
    name_others(path)
    with pytest.raises(ValueError, match="no tensor 'blocks"):
        learner.backward(X, Y, optimizers=offloaded.optimizers)


def test_a_saved_run_is_not_overwritten_and_another_model_refused(tmp_path: Path) -> None:
    learner, offloaded = built(tmp_path / "run")
    train(learner, offloaded, schedules(offloaded), begin=0, end=2, save_at=2)
    with pytest.raises(ValueError, match="in use by another store"):
        bll.FileStore(tmp_path / "run")
    closed(offloaded)
    refused = [
        ({"resume": False}, "holds a saved run"),
        ({"width": 24}, r"is of another model: 'blocks\.0\.0\.weight' was torch\.float32 of shape \(16, 8\)"),
        ({"optimizer": partial(torch.optim.SGD, lr=0.1)}, "was AdamW and is SGD"),
        ({"optimizer": None}, "was AdamW and is none"),
        ({"loss": bll.Predictive("linear") + bll.Similarity()}, "of another model"),
    ]
    for settings, said in refused:
        with pytest.raises(ValueError, match=said):
            built(tmp_path / "run", **{"resume": True} | settings)
    assert resumed(tmp_path / "run")[3] == 2


def test_what_cannot_be_saved_is_refused_and_what_was_saved_stays(tmp_path: Path) -> None:
    learner, offloaded = built(tmp_path / "run")
    train(learner, offloaded, schedules(offloaded), begin=0, end=2, save_at=1)
    with pytest.raises(ValueError, match="progress= must be made of"):
        offloaded.save({"model": nn.Linear(1, 1)})
    closed(offloaded)
    assert resumed(tmp_path / "run")[3] == 1


def test_folders_of_something_else_are_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("notes")
    with pytest.raises(ValueError, match=r"holds 'mine\.txt'"):
        bll.FileStore(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_files_of_an_unsaved_run_are_removed(tmp_path: Path) -> None:
    learner, offloaded = built(tmp_path / "run")
    learner.backward(X, Y, optimizers=offloaded.optimizers)
    closed(offloaded)
    assert list((tmp_path / "run").glob("*.safetensors"))
    bll.FileStore(tmp_path / "run").close()
    assert not list((tmp_path / "run").glob("*.safetensors"))


def test_old_versions_do_not_pile_up(tmp_path: Path) -> None:
    learner, offloaded = built(tmp_path / "run")
    train(learner, offloaded, [], begin=0, end=8, save_at=4)
    assert len(list((tmp_path / "run").glob("*.safetensors"))) <= 2 * 6 + 1
    offloaded.save()
    assert len(list((tmp_path / "run").glob("*.safetensors"))) == 6 + 1


def test_the_model_is_written_block_by_block(tmp_path: Path) -> None:
    learner, offloaded = built(tmp_path / "run")
    train(learner, offloaded, [], begin=0, end=3)
    offloaded.save_model(tmp_path / "model.safetensors")
    with files_up_to(100), pytest.raises(OSError, match="too large"):
        offloaded.save_model(tmp_path / "model.safetensors")
    train(learner, offloaded, [], begin=3, end=3)
    offloaded.end()
    assert_equal(load_file(tmp_path / "model.safetensors"), dict(learner.model.state_dict()))
    assert not list(tmp_path.glob("*.part"))


def test_what_is_saved_beside_the_blocks_comes_back(tmp_path: Path) -> None:
    inner = {
        "rates": [0.1, float("inf")],
        "milestones": Counter({3: 1}),
        4: (None, True, "text"),
        "dtype": torch.bfloat16,
    }
    state = {"random": torch.get_rng_state(), "scalar": torch.tensor(2.5), "none": torch.empty(0, 3), "inner": inner}
    store = bll.FileStore(tmp_path / "run")
    store.save(state)
    store.close()
    found = bll.FileStore(tmp_path / "run").resume()
    assert_equal(found, state)
    assert type(found["inner"]["milestones"]) is Counter


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int8, torch.bool])
def test_files_are_those_of_safetensors(tmp_path: Path, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    tensors = {
        "a": torch.randn(3, 5).mul(9).to(dtype),
        "b": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
    }
    outlines = {name: torch.empty_like(tensor, device="meta") for name, tensor in tensors.items()}
    ours, theirs = tmp_path / "ours.safetensors", tmp_path / "theirs.safetensors"
    ordered = sorted(tensors, key=lambda name: -tensors[name].element_size())
    write(ours, {name: outlines[name] for name in ordered}, (tensors[name] for name in ordered))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, theirs)
    assert_equal(load_file(ours), tensors)
    for path in (ours, theirs):
        found = read(path, outlines, device=torch.device("cpu"))
        assert_equal(found, tensors)
        assert all(found[name].stride() == tensor.stride() for name, tensor in tensors.items())
