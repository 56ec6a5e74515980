"""The files of a part: what comes back out of them, and what never passes."""

import hashlib
import json
import os
import pickle
import random
import shutil
import struct
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from blocklocal.lab.errors import UserError
from blocklocal.lab.runs.checkpoint_part import Part, State, Value

DTYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.complex64),
]


def state() -> State:
    """Two tensors and two values, small enough to try all that can happen to their files."""
    return {
        "weight": torch.arange(12, dtype=torch.float32).view(3, 4),
        "random": torch.arange(8, dtype=torch.uint8),
        "rule": "usf",
        "seconds": 1.5,
    }


EXPECTED = state() | {"bias": torch.tensor(10.5), "seconds": 10.5}


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of block 1 after minibatch 10, to be copied and damaged; block 0 and minibatch 5 stand beside it."""
    cuts = tmp_path_factory.mktemp("sound")
    for step, block in ((5, 1), (10, 0), (10, 1)):
        part = Part(cuts / f"step-{step}" / f"block-{block}", step, block)
        part.write(state() | {"bias": torch.tensor(step + block / 2), "seconds": step + block / 2})
    return cuts / "step-10" / "block-1"


@pytest.fixture
def part(sound, tmp_path) -> Part:
    """A copy of it, with the others beside it."""
    shutil.copytree(sound.parents[1], tmp_path / "cuts")
    return Part(tmp_path / "cuts" / "step-10" / "block-1", 10, 1)


def same(one: Mapping[str, Value], other: Mapping[str, Value]) -> bool:
    """To the bit, with the same types."""

    def content(value: Value) -> object:
        if not isinstance(value, torch.Tensor):
            return type(value), value
        return value.dtype, value.shape, value.contiguous().flatten().view(torch.uint8).tolist()

    return {name: content(value) for name, value in one.items()} == {name: content(other[name]) for name in other}


def seal(path: Path, content: object) -> None:
    """Make it an index, with a checksum that is right, as somebody could who means harm."""
    if isinstance(content, dict):
        bare = json.dumps({name: content[name] for name in content if name != "checksum"}, sort_keys=True)
        content = content | {"checksum": hashlib.sha256(bare.encode()).hexdigest()}
    (path / "index.json").write_text(json.dumps(content, sort_keys=True, indent=1) + "\n")


def index(path: Path) -> dict:
    return json.loads((path / "index.json").read_text())


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_kind_of_tensor_comes_back_to_the_bit(tmp_path, dtype):
    torch.manual_seed(0)
    tensors = {
        f"{'x'.join(map(str, shape)) or 'scalar'} 'ü\n": torch.randint(0, 256, (*shape, dtype.itemsize)).byte()
        for shape in ((), (0,), (3, 0, 2), (1,), (5, 7), (2, 3, 4, 5))
    }
    tensors = {name: bits.view(dtype).squeeze(-1) for name, bits in tensors.items()}  # NaNs of all kinds among them
    written = tensors | {"a": torch.tensor([True, False]), "seed": 2**63, "seconds": 0.1, "rule": "usf(é\x1b)"}
    part = Part(tmp_path / "step-3" / "block-0", 3, 0)
    part.write(written)
    assert same(part.read(), written)
    assert same(load_file(part.path / "tensors.safetensors"), tensors | {"a": written["a"]})


def test_others_may_read_it_as_they_may_other_files(part):
    (part.path.parent / "other").write_text("")
    modes = {file.stat().st_mode for file in (*part.path.iterdir(), part.path.parent / "other")}
    assert len(modes) == 1


def test_no_single_bit_can_change(part):
    files = [part.path / name for name in ("index.json", "tensors.safetensors")]
    draw, tried = random.Random(0), 0
    for file in files:
        whole = file.read_bytes()
        for place in range(len(whole)):  # all of them: header, offsets, padding, numbers
            bit = draw.randrange(8)
            file.write_bytes(whole[:place] + bytes([whole[place] ^ (1 << bit)]) + whole[place + 1 :])
            with pytest.raises(UserError, match=r"not a readable checkpoint.*(index\.json|tensors\.safetensors)"):
                part.read()
            tried += 1
        file.write_bytes(whole)
    assert same(part.read(), EXPECTED)
    assert tried > 500


@given(data=st.data())
def test_no_other_change_passes(sound, data):
    part = Part(sound, 10, 1)
    file = sound / data.draw(st.sampled_from(["index.json", "tensors.safetensors"]))
    whole = file.read_bytes()
    begin, end = sorted(data.draw(st.tuples(*[st.integers(0, len(whole))] * 2)))
    changed = whole[:begin] + data.draw(st.binary(max_size=40)) + whole[end:]
    try:
        file.write_bytes(changed)
        if changed == whole:
            assert same(part.read(), EXPECTED)
        else:
            with pytest.raises(UserError, match="not a readable checkpoint"):
                part.read()
    finally:
        file.write_bytes(whole)


class Trap:
    def __reduce__(self):
        return os.mkdir, ("trapped",)


def replace_file(name: str, content: bytes | str) -> Callable[[Path], object]:
    return lambda path: (path / name).write_bytes(content.encode() if isinstance(content, str) else content)


def take_file(name: str, *, of: str) -> Callable[[Path], object]:
    return lambda path: shutil.copy(path / of / name, path / name)


def link(name: str, to: str) -> Callable[[Path], object]:
    def change(path: Path) -> None:
        (path / name).unlink()
        (path / name).symlink_to(path / to)

    return change


def fifo(path: Path) -> None:
    (path / "tensors.safetensors").unlink()
    os.mkfifo(path / "tensors.safetensors")


def folder(path: Path) -> None:
    (path / "index.json").unlink()
    (path / "index.json").mkdir()


def sparse(name: str) -> Callable[[Path], object]:
    return lambda path: os.truncate(path / name, 2**40)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda path: shutil.rmtree(path), "No such file or directory.*block-1"),
        (lambda path: (path / "index.json").unlink(), r"'index\.json' is missing"),
        (lambda path: (path / "tensors.safetensors").unlink(), r"'tensors\.safetensors' is missing"),
        (replace_file("more.safetensors", b""), r"'more\.safetensors' does not belong there"),
        (replace_file("\x1b[31m", b""), r"'\\x1b\[31m' does not belong there"),
        (replace_file("index.json", b""), r"index\.json: Expecting value"),
        (
            replace_file("tensors.safetensors", b""),
            r"tensors\.safetensors has 0 bytes, and index\.json: ",
        ),
        (replace_file("index.json", b"\xff\xfe"), r"index\.json: "),
        (replace_file("index.json", "[" * 100_000), r"index\.json: maximum recursion"),
        (replace_file("index.json", '{"format": ' + "9" * 10_000 + "}"), r"index\.json: Exceeds the limit"),
        (replace_file("index.json", pickle.dumps(Trap())), r"index\.json: "),
        (replace_file("tensors.safetensors", pickle.dumps(Trap())), r"tensors\.safetensors has \d+ bytes"),
        (
            take_file("tensors.safetensors", of="../../step-5/block-1"),
            r"tensors\.safetensors is not the file whose",
        ),
        (take_file("index.json", of="../block-0"), r"index\.json: block is 0 instead of 1"),
        (take_file("index.json", of="../../step-5/block-1"), r"index\.json: step is 5 instead of 10"),
        (link("tensors.safetensors", "../block-0/tensors.safetensors"), r"tensors\.safetensors is not a regular file"),
        (link("index.json", "/dev/zero"), r"index\.json is not a regular file"),
        (fifo, r"tensors\.safetensors is not a regular file"),
        (folder, r"index\.json is not a regular file"),
        (sparse("index.json"), r"index\.json has 1099511627776 bytes"),
        (sparse("tensors.safetensors"), r"tensors\.safetensors has 1099511627776 bytes, and"),
    ],
)
def test_damaged_files_are_named(part, monkeypatch, damage, words):
    monkeypatch.chdir(part.path.parents[2])
    damage(part.path)
    with pytest.raises(UserError, match=words) as caught:
        part.read()
    assert str(part.path) in str(caught.value)
    assert "weights_only" not in str(caught.value)
    assert not Path("trapped").exists()


def put(**entries: object) -> Callable[[Path], object]:
    return lambda path: seal(path, index(path) | entries)


def put_tensor(**entries: object) -> Callable[[Path], object]:
    def change(path: Path) -> None:
        content = index(path)
        content["tensors"]["weight"] |= entries
        seal(path, content)

    return change


def drop(name: str) -> Callable[[Path], object]:
    return lambda path: seal(path, {key: value for key, value in index(path).items() if key != name})


def write_twice(path: Path) -> None:
    text = (path / "index.json").read_text()
    (path / "index.json").write_text(text.replace('"block": 1,', '"block": 0,\n "block": 1,'))


def compact(path: Path) -> None:
    (path / "index.json").write_text(json.dumps(index(path)))


def header(**entries: object) -> Callable[[Path], object]:
    """Tensors under this header, and an index that agrees."""

    def change(path: Path) -> None:
        written = json.dumps(entries).encode()
        file = path / "tensors.safetensors"
        file.write_bytes(struct.pack("<Q", len(written)) + written + bytes(56))
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        seal(path, index(path) | {"bytes": file.stat().st_size, "sha256": digest})

    return change


def claim_header(path: Path) -> None:
    file = path / "tensors.safetensors"
    file.write_bytes(struct.pack("<Q", 2**63) + file.read_bytes()[8:])
    seal(path, index(path) | {"sha256": hashlib.sha256(file.read_bytes()).hexdigest()})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (put(format=2), "format 2, but this version reads format 1"),
        (drop("format"), "format nothing, but"),
        (put(step=11), "step is 11 instead of 10"),
        (put(step="10"), "step is '10' instead of 10"),
        (put(block=True), "does not have its own checksum"),
        (put(block=1.0), "does not have its own checksum"),
        (put(file="/etc/passwd"), r"file is '/etc/passwd' instead of 'tensors\.safetensors'"),
        (put(file="../block-0/tensors.safetensors"), r"file is '\.\./block-0"),
        (put(file=None), "file is nothing instead"),
        (put(bytes=float("nan")), r"bytes is nan\)"),
        (put(bytes=10**30), r"bytes is 10{30}\)"),
        (put(bytes=-1), r"bytes is -1\)"),
        (put(sha256="0" * 64), r"is not the file whose sha256 is in index\.json"),
        (put(sha256=["x"] * 1000), r"is not the file whose sha256 is in index\.json"),
        (put(more={"\x1b]0;": 1}), "more is .* instead of nothing"),
        (put(tensors={}), "tensors/[a-z]+ is nothing instead"),
        (put(tensors=[]), r"tensors is \[\] instead"),
        (put_tensor(dtype="float64"), "tensors/weight/dtype is 'float64' instead of 'float32'"),
        (put_tensor(shape=[4, 3]), r"tensors/weight/shape is \[4, 3\] instead of \[3, 4\]"),
        (put_tensor(shape=[2**62, 2**62]), r"tensors/weight/shape is \[\d+, \d+\] instead"),
        (put_tensor(data="../../x"), "tensors/weight/data is '../../x' instead of nothing"),
        (put(values=[]), r"values is \[\]"),
        (drop("values"), "values is nothing"),
        (put(values={"seconds": None}), "values/seconds is nothing"),
        (put(values={"\x1b": {"a": {}}}), r"values/\\x1b is \{'a': \{\}\}"),
        (put(values={"seconds": float("inf")}), "values/seconds is inf"),
        (lambda path: seal(path, [index(path)]), "is a list instead of an object"),
        (lambda path: seal(path, None), "is a NoneType instead of an object"),
        (write_twice, "does not have its own checksum"),
        (compact, "does not have its own checksum"),
        (claim_header, "tensors.safetensors: "),
        (header(), "tensors.safetensors: "),
        (header(weight={"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 56]}), "tensors.safetensors: "),
        (header(weight={"dtype": "F32", "shape": [14], "data_offsets": [0, 2**62]}), "tensors.safetensors: "),
        (header(weight={"dtype": "F32", "shape": [14], "data_offsets": [56, 0]}), "tensors.safetensors: "),
        (header(weight={"dtype": "P9", "shape": [14], "data_offsets": [0, 56]}), "tensors.safetensors: "),
        (
            header(weight={"dtype": "F32", "shape": [14], "data_offsets": [0, 56]}),
            r"tensors/weight/shape is \[3, 4\] instead of \[14\]",
        ),
    ],
)
def test_an_index_that_was_made_up_is_refused(part, change, words):
    change(part.path)
    with pytest.raises(UserError, match=words):
        part.read()


def test_older_versions_and_their_pickle_are_not_read(part, monkeypatch):
    monkeypatch.chdir(part.path)
    (part.path / ".metadata").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(UserError, match=r"block-1' is a checkpoint of an older version.*blocklocal 0\.1$"):
        part.read()
    assert part.whole, "so that it is not taken for one that a kill has left half, and thrown away"
    assert not Path("trapped").exists()
