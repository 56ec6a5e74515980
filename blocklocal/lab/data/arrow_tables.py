"""Data sets in Arrow tables, such as Parquet files, with a column of encoded images and one of labels."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from torch import Tensor

from blocklocal.arguments import first_line
from blocklocal.lab.data.dataset import TEST_NAMES, Dataset, Sizes, Split, sample
from blocklocal.lab.data.decode import decode
from blocklocal.lab.data.image_folders import check_regular
from blocklocal.lab.errors import UserError

IMAGE_COLUMNS = ("image", "img")
LABEL_COLUMNS = ("label", "fine_label", "labels")


@dataclass(frozen=True)
class Part:
    """Rows of a split. origin: where they come from. label: name of the column. classes: names, empty if unknown."""

    origin: str
    label: str
    labels: Tensor
    images: pa.ChunkedArray
    classes: tuple[str, ...]

    @staticmethod
    def of(table: pa.Table, *, origin: str) -> Part:
        """The rows of a table. UserError: missing columns or columns of another type, a row without a label."""
        label = _column(table.column_names, LABEL_COLUMNS, origin=origin)
        image = _column(table.column_names, IMAGE_COLUMNS, origin=origin)
        return Part(
            origin=origin,
            label=label,
            labels=_labels(table[label], column=label, origin=origin),
            images=_contents(table[image], column=image, origin=origin),
            classes=_class_names(table.schema.metadata or {}, column=label, origin=origin),
        )

    def encoded(self) -> Iterator[tuple[str, bytes]]:
        """The name and the bytes of every image. UserError: a row without an image."""
        row = 0
        for chunk in self.images.chunks:
            for content in chunk.to_pylist():
                if content is None:
                    raise UserError(f"{self.origin!r}: row {row} holds no image bytes")
                yield f"{self.origin}, row {row}", content
                row += 1


def read(file: Path) -> Part:
    """Read a Parquet file. UserError: it is not one of images and labels."""
    check_regular(file)
    try:
        with file.open("rb") as content:
            parquet = pq.ParquetFile(content)
            names = parquet.schema_arrow.names
            columns = [_column(names, known, origin=str(file)) for known in (IMAGE_COLUMNS, LABEL_COLUMNS)]
            table = parquet.read(columns=columns)
    except (pa.ArrowException, OSError, UnicodeError) as error:
        raise UserError(f"{str(file)!r} is not a readable Parquet file ({first_line(error)}); get it again") from error
    return Part.of(table, origin=str(file))


def from_parts(splits: Mapping[str, Sequence[Part]], sizes: Sizes, *, name: str) -> Dataset:
    """The data set made of these parts. UserError: no training or test images, parts that disagree on labels."""
    test = next((part for part in TEST_NAMES if part in splits), None)
    if "train" not in splits or test is None:
        raise UserError(f"data {name!r} has the splits {', '.join(splits) or 'none'}: train and test are needed")
    for split in ("train", test):
        if not any(len(part.labels) for part in splits[split]):
            raise UserError(f"data {name!r} has no images in the split {split!r}")
    used = [*splits["train"], *splits[test]]
    for part in used[1:]:
        if part.label != used[0].label:
            raise UserError(
                f"the labels of {used[0].origin!r} are in column {used[0].label!r}, those of {part.origin!r} in "
                f"{part.label!r}: give both the same columns"
            )
    return Dataset(
        name=name,
        classes=_agreed(used) or _numbered(splits["train"], name=name),
        train=_split(splits["train"], size=sizes.train),
        test=_split(splits[test], size=sizes.test),
    )


def _split(parts: Sequence[Part], *, size: int) -> Split:
    labels = torch.cat([part.labels for part in parts])
    kept = sample(len(labels), size=size)
    rows = set(kept.tolist())
    encoded = (pair for part in parts for pair in part.encoded())
    return Split(decode(pair for row, pair in enumerate(encoded) if row in rows), labels[kept])


def _agreed(parts: Sequence[Part]) -> tuple[str, ...]:
    """The class names that all parts with names agree on."""
    named = [part for part in parts if part.classes]
    for part in named[1:]:
        if part.classes != named[0].classes:
            raise UserError(f"{named[0].origin!r} and {part.origin!r} have different class names in their schemas")
    return named[0].classes if named else ()


def _numbered(parts: Sequence[Part], *, name: str) -> tuple[str, ...]:
    """Numbers as class names, for as many classes as the training labels count."""
    labels = torch.cat([part.labels for part in parts])
    largest = int(labels.max())
    if labels.min() < 0 or largest >= len(labels):
        wrong = int(labels.min()) if labels.min() < 0 else largest
        raise UserError(
            f"data {name!r}: label {wrong} is out of range: without class names in the schema, labels count the "
            f"classes from 0, and there are {len(labels)} training images"
        )
    return tuple(map(str, range(largest + 1)))


def _column(names: Sequence[str], known: Sequence[str], *, origin: str) -> str:
    for name in known:
        if name in names:
            if names.count(name) > 1:
                raise UserError(f"{origin!r} has more than one column {name!r}")
            return name
    raise UserError(f"{origin!r} has no column {' or '.join(known)}: it has {', '.join(names) or 'none'}")


def _labels(values: pa.ChunkedArray, *, column: str, origin: str) -> Tensor:
    if not pa.types.is_integer(values.type):
        raise UserError(f"{origin!r}: column {column!r} must hold an integer for every image, it is {values.type}")
    if values.null_count:
        row = pc.index(values.is_null(), True).as_py()
        raise UserError(f"{origin!r}: row {row} of column {column!r} holds no label")
    try:
        return torch.tensor(values.cast(pa.int64()).to_numpy())
    except pa.ArrowInvalid as error:
        raise UserError(f"{origin!r}: column {column!r} holds a label out of range ({first_line(error)})") from error


def _contents(values: pa.ChunkedArray, *, column: str, origin: str) -> pa.ChunkedArray:
    kind = values.type
    place = kind.get_field_index("bytes") if pa.types.is_struct(kind) else -1
    if place < 0 or not _is_binary(kind.field(place).type):
        raise UserError(f"{origin!r}: column {column!r} must be a struct of bytes and path, it is {kind}")
    # unlike the field itself, it is null where the struct is
    return pc.struct_field(values, [place])  # pyright: ignore[reportAttributeAccessIssue]


def _is_binary(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)


def _class_names(metadata: Mapping[bytes, bytes], *, column: str, origin: str) -> tuple[str, ...]:
    """The class names in the schema's `huggingface` entry; none if the column is not in it."""
    try:
        entry = json.loads(metadata.get(b"huggingface", b"{}"))
        names = entry.get("info", {}).get("features", {}).get(column, {}).get("names", [])
        if isinstance(names, list) and all(isinstance(name, str) for name in names):
            return tuple(names)
    except (ValueError, AttributeError, RecursionError):
        pass
    raise UserError(f"{origin!r}: the entry 'huggingface' of the schema is damaged; get the file again")
