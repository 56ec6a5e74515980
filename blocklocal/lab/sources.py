"""Where data sets come from: scikit-learn, the Hugging Face hub, folders of Parquet files or of images."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from blocklocal.lab.data import Dataset, Sizes, Split, sample
from blocklocal.lab.decode import decode
from blocklocal.lab.errors import UserError

HUB = {
    "fashion_mnist": "zalando-datasets/fashion_mnist",
    "cifar10": "uoft-cs/cifar10",
    "cifar100": "uoft-cs/cifar100",
}
IMAGE_COLUMNS = ("image", "img")
LABEL_COLUMNS = ("label", "fine_label", "labels")
TEST_NAMES = ("test", "validation", "val")  # the first one that is there
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff")


def digits(sizes: Sizes) -> Dataset:
    """scikit-learn's 1,797 handwritten digits, 8x8; every fifth image of each class is for testing."""
    package = find_spec("sklearn")
    assert package is not None
    assert package.origin is not None
    file = Path(package.origin).parent / "datasets" / "data" / "digits.csv.gz"  # to import sklearn takes a second
    rows = torch.as_tensor(np.loadtxt(file, delimiter=",", dtype=np.int64))  # 64 pixels and the label
    images = (15 * rows[:, :64]).to(torch.uint8).reshape(-1, 1, 8, 8)  # 0..16 -> 0..240
    labels = rows[:, 64].clone()
    test = torch.zeros(len(labels), dtype=torch.bool)
    for label in range(10):
        test[(labels == label).nonzero()[4::5]] = True
    return Dataset(
        name="digits",
        classes=tuple(map(str, range(10))),
        train=Split(images[~test], labels[~test]).sample(sizes.train),
        test=Split(images[test], labels[test]).sample(sizes.test),
    )


def hub(repository: str, sizes: Sizes) -> Dataset:
    """A data set of the Hugging Face hub, kept in the cache of `datasets`."""
    import datasets
    from datasets.exceptions import DatasetsError
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()  # its retries, where there is no connection, say nothing that the error does not
    try:
        splits = datasets.load_dataset(repository)
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(
            f"cannot get {repository!r} from the Hugging Face hub ({reason}); "
            "check name and connection, or name a folder with its Parquet files instead"
        ) from error
    tables = {}
    for name, split in splits.items():
        for column in split.column_names:
            if isinstance(split.features[column], datasets.Image):
                split = split.cast_column(column, datasets.Image(decode=False))
        tables[str(name)] = [(f"{repository} ({name})", split.with_format("arrow")[:])]
    return _from_tables(tables, sizes, name=repository)


def folder(path: Path, sizes: Sizes) -> Dataset:
    """A folder of Parquet files train-*.parquet and test-*.parquet, or of images train/CLASS/* and test/CLASS/*."""
    if any(path.rglob("*.parquet")):
        files = {name: sorted(path.rglob(f"{name}*.parquet")) for name in ("train", *TEST_NAMES)}
        return _from_tables(
            {name: [(str(file), _read(file)) for file in found] for name, found in files.items() if found},
            sizes,
            name=str(path),
        )
    if (path / "train").is_dir():
        return _from_images(path, sizes)
    raise UserError(f"folder {str(path)!r} holds neither train-*.parquet files nor train/CLASS/ folders of images")


def _from_images(path: Path, sizes: Sizes) -> Dataset:
    test = next((name for name in TEST_NAMES if (path / name).is_dir()), None)
    if test is None:
        raise UserError(f"folder {str(path)!r} has train/ but none of {', '.join(TEST_NAMES)}: add test/CLASS/ images")
    classes = tuple(sorted(entry.name for entry in (path / "train").iterdir() if entry.is_dir()))
    strangers = sorted(entry.name for entry in (path / test).iterdir() if entry.is_dir() and entry.name not in classes)
    if strangers:
        raise UserError(f"{str(path / test)!r} has class {strangers[0]!r}, which train/ has not")

    def split(part: str, *, size: int) -> Split:
        files = [
            (file, label)
            for label, name in enumerate(classes)
            for file in sorted((path / part / name).rglob("*"))
            if file.suffix.lower() in SUFFIXES
        ]
        if not files:
            raise UserError(
                f"no images in {str(path / part)!r}: they are sought in {part}/CLASS/*{{{','.join(SUFFIXES)}}}"
            )
        files = [files[i] for i in sample(len(files), size=size)]
        images = decode((str(file), file.read_bytes()) for file, _ in files)
        return Split(images, torch.tensor([label for _, label in files]))

    return Dataset(
        name=str(path),
        classes=classes,
        train=split("train", size=sizes.train),
        test=split(test, size=sizes.test),
    )


def _read(file: Path) -> pa.Table:
    try:
        return pq.read_table(file)
    except (pa.ArrowException, OSError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"{str(file)!r} is not a readable Parquet file ({reason}); get it anew") from error


def _from_tables(tables: dict[str, list[tuple[str, pa.Table]]], sizes: Sizes, *, name: str) -> Dataset:
    """From the tables of each split, each with the name of its origin."""
    test = next((part for part in TEST_NAMES if part in tables), None)
    if "train" not in tables or test is None:
        raise UserError(f"data {name!r} has the splits {', '.join(tables) or 'none'}: train and test are needed")
    origin, table = tables["train"][0]
    classes = _class_names(table, column=_column(table, LABEL_COLUMNS, origin=origin))
    return Dataset(
        name=name,
        classes=classes or tuple(map(str, range(int(_labels(tables["train"]).max()) + 1))),
        train=_split(tables["train"], size=sizes.train),
        test=_split(tables[test], size=sizes.test),
    )


def _split(tables: Sequence[tuple[str, pa.Table]], *, size: int) -> Split:
    labels = _labels(tables)
    kept = sample(len(labels), size=size)
    rows = set(kept.tolist())
    encoded = (pair for origin, table in tables for pair in _encoded(table, origin=origin))
    return Split(decode(pair for row, pair in enumerate(encoded) if row in rows), labels[kept])


def _labels(tables: Sequence[tuple[str, pa.Table]]) -> Tensor:
    labels = []
    for origin, table in tables:
        column = _column(table, LABEL_COLUMNS, origin=origin)
        values = table[column]
        if not pa.types.is_integer(values.type) or values.null_count:
            raise UserError(f"{origin!r}: column {column!r} must hold an integer for every image, it is {values.type}")
        labels.append(torch.tensor(values.to_numpy(), dtype=torch.int64))
    return torch.cat(labels)


def _encoded(table: pa.Table, *, origin: str) -> Iterator[tuple[str, bytes]]:
    column = _column(table, IMAGE_COLUMNS, origin=origin)
    kind = table.schema.field(column).type
    if not pa.types.is_struct(kind) or kind.get_field_index("bytes") < 0:
        raise UserError(f"{origin!r}: column {column!r} must be a struct of bytes and path, it is {kind}")
    for row, content in enumerate(
        value for chunk in table[column].chunks for value in chunk.field("bytes").to_pylist()
    ):
        if content is None:
            raise UserError(f"{origin!r}: row {row} of column {column!r} holds no image bytes")
        yield f"{origin}, row {row}", content


def _column(table: pa.Table, names: Sequence[str], *, origin: str) -> str:
    for name in names:
        if name in table.column_names:
            return name
    raise UserError(f"{origin!r} has no column {' or '.join(names)}: it has {', '.join(table.column_names)}")


def _class_names(table: pa.Table, *, column: str) -> tuple[str, ...]:
    """The names in the schema's `huggingface` metadata; none where it says nothing of the column."""
    metadata = json.loads((table.schema.metadata or {}).get(b"huggingface", b"{}"))
    return tuple(metadata.get("info", {}).get("features", {}).get(column, {}).get("names", ()))
