"""A block's part of a checkpoint: a folder with tensors.safetensors, and index.json, which describes it.

Reading them runs no code. The index must equal, byte for byte, what `_encode` makes of the tensors found; otherwise the
part is refused. So a change of a single bit in either file is detected.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import shutil
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from reprlib import Repr
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from blocklocal.lab.errors import UserError

Value = Tensor | str | int | float
State = dict[str, Value]

FORMAT = 1
TENSORS, INDEX = "tensors.safetensors", "index.json"
PICKLED = ".metadata"  # the index of older versions
LARGEST = 2**26  # bytes of an index, of half a million tensors


@dataclass(frozen=True)
class Part:
    """The part for block `block` after minibatch `step`. `path` need not exist yet."""

    path: Path
    step: int
    block: int

    @property
    def whole(self) -> bool:
        """Whether the part is complete: the index is written last, by renaming."""
        return any(os.path.lexists(self.path / name) for name in (INDEX, PICKLED))

    def write(self, state: State) -> None:
        """Write the state; tensors must be contiguous and on the CPU. OSError, SafetensorError: this failed."""
        values = {name: value for name, value in state.items() if not isinstance(value, Tensor)}
        tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
        file, index, unnamed = self.path / TENSORS, self.path / INDEX, self.path / f"{INDEX}.part"
        self.path.mkdir(parents=True, exist_ok=True)
        index.unlink(missing_ok=True)
        save_file(tensors, file)
        content = self._content(file.stat().st_size, _digest(file), tensors) | {"values": values}
        unnamed.write_bytes(_encode(content))
        shutil.copymode(unnamed, file)  # safetensors makes it readable by the owner only
        for path in (file, unnamed):
            _sync(path)
        unnamed.replace(index)
        for folder in (self.path, *self.path.parents[:2]):
            _sync(folder)

    def read(self) -> State:
        """Read the state. UserError: it is not as `write` left it; the message names the file and the field.

        The tensors are mapped from the file: copy those to keep.
        """
        if os.path.lexists(self.path / PICKLED):
            raise UserError(
                f"{str(self.path)!r} is a checkpoint of an older version, which is no longer supported: "
                "start a new run with another --out, or resume with blocklocal 0.1"
            )
        try:
            return self._read()
        except (OSError, ValueError) as error:
            raise UserError(
                f"{str(self.path)!r} is not a readable checkpoint ({error}); "
                "restore it from a copy, or start a new run with another --out"
            ) from error

    def _read(self) -> State:
        names = {path.name for path in self.path.iterdir()}
        for name in sorted(names ^ {TENSORS, INDEX}):
            raise ValueError(f"{_short(name)} {'does not belong there' if name in names else 'is missing'}")
        file, index = self.path / TENSORS, self.path / INDEX
        for path in (file, index):
            if not stat.S_ISREG(path.lstat().st_mode):
                raise ValueError(f"{path.name} is not a regular file")
        if index.stat().st_size > LARGEST:
            raise ValueError(f"{INDEX} has {index.stat().st_size} bytes, {LARGEST} at most")
        written = index.read_bytes()
        found = _decode(written)
        _compare({name: found.get(name) for name in self._place}, self._place)
        if found.get("bytes") != (size := file.stat().st_size):
            raise ValueError(f"{TENSORS} has {size} bytes, and {INDEX}: bytes is {_short(found.get('bytes'))}")
        if found.get("sha256") != (digest := _digest(file)):
            raise ValueError(f"{TENSORS} is not the file whose sha256 is in {INDEX}")
        tensors = _load(file)
        content = self._content(size, digest, tensors) | {"values": _values(found)}
        _compare({name: found[name] for name in found if name != "checksum"}, content)
        if _encode(content) != written:
            raise ValueError(f"{INDEX} does not have its own checksum")
        return {**tensors, **content["values"]}

    def _content(self, size: int, digest: str, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        """The part of the index that follows from place and tensors."""
        return self._place | {"bytes": size, "sha256": digest, "tensors": _outlines(tensors)}

    @property
    def _place(self) -> dict[str, Any]:
        return {"format": FORMAT, "step": self.step, "block": self.block, "file": TENSORS}


def _outlines(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    return {
        name: {"dtype": str(tensor.dtype).removeprefix("torch."), "shape": list(tensor.shape)}
        for name, tensor in tensors.items()
    }


def _load(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except SafetensorError as error:
        raise ValueError(f"{file.name}: {error}") from error


def _digest(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _encode(content: dict[str, Any]) -> bytes:
    """The bytes of an index, including its own checksum. ValueError: a number that JSON cannot express."""
    bare = json.dumps(content, sort_keys=True, allow_nan=False)
    whole = content | {"checksum": hashlib.sha256(bare.encode()).hexdigest()}
    return (json.dumps(whole, sort_keys=True, indent=1) + "\n").encode()


def _decode(written: bytes) -> dict[str, Any]:
    try:
        found = json.loads(written)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{INDEX}: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{INDEX} is a {type(found).__name__} instead of an object")
    if found.get("format") != FORMAT:
        raise ValueError(f"{INDEX}: format {_short(found.get('format'))}, but this version reads format {FORMAT}")
    return found


def _values(found: dict[str, Any]) -> dict[str, str | int | float]:
    values = found.get("values")
    if not isinstance(values, dict):
        raise ValueError(f"{INDEX}: values is {_short(values)}")
    for name, value in values.items():
        if not isinstance(value, str | int | float) or (isinstance(value, float) and not math.isfinite(value)):
            raise ValueError(f"{INDEX}: values/{_short(name)[1:-1]} is {_short(value)}")
    return values


def _compare(found: Any, expected: Any, *, at: str = "") -> None:
    """Compare an index with what it should be. ValueError: names the first difference."""
    if isinstance(found, dict) and isinstance(expected, dict):
        for name in {**expected, **found}:
            _compare(found.get(name), expected.get(name), at=f"{at}/{_short(name)[1:-1]}".lstrip("/"))
    elif found != expected:
        raise ValueError(f"{INDEX}: {at} is {_short(found)} instead of {_short(expected)}")


def _short(value: object) -> str:
    """The value as text, shortened if long, and without control characters."""
    return "nothing" if value is None else _REPR.repr(value)


_REPR = Repr()
_REPR.maxstring = _REPR.maxother = 100


def _sync(path: Path) -> None:
    """Flush a file or folder to disk."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a file system that does not support this for folders
            raise
    finally:
        os.close(opened)
