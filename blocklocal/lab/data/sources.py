"""Where data sets come from: scikit-learn, the Hugging Face hub, folders of Parquet files or of images."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch

from blocklocal.arguments import first_line
from blocklocal.lab.data import arrow_tables
from blocklocal.lab.data.dataset import TEST_NAMES, Dataset, Sizes, Split
from blocklocal.lab.data.image_folders import from_images, walk
from blocklocal.lab.errors import UserError

HUB = {
    "fashion_mnist": "zalando-datasets/fashion_mnist",
    "cifar10": "uoft-cs/cifar10",
    "cifar100": "uoft-cs/cifar100",
}


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
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()  # its retries, where there is no connection, say nothing that the error does not
    try:
        splits = datasets.load_dataset(repository)
    except Exception as error:  # of the hub's client, its cache and the readers of any format
        raise UserError(
            f"cannot get {repository!r} from the Hugging Face hub ({first_line(error)}); "
            "check name and connection, or name a folder with its Parquet files instead"
        ) from error
    parts = {}
    for name, split in splits.items():
        for column in split.column_names:
            if isinstance(split.features[column], datasets.Image):
                split = split.cast_column(column, datasets.Image(decode=False))
        parts[str(name)] = [arrow_tables.Part.of(split.with_format("arrow")[:], origin=f"{repository} ({name})")]
    return arrow_tables.from_parts(parts, sizes, name=repository)


def folder(path: Path, sizes: Sizes) -> Dataset:
    """A folder of Parquet files train-*.parquet and test-*.parquet, or of images train/CLASS/* and test/CLASS/*."""
    files = sorted(walk(path, suffixes=(".parquet",)))
    if files:
        splits = {part: [file for file in files if file.name.startswith(part)] for part in ("train", *TEST_NAMES)}
        for part, found in splits.items():
            homes = sorted({str(file.parent) for file in found})
            if len(homes) > 1:
                raise UserError(f"files {part}*.parquet are in {homes[0]!r} and in {homes[1]!r}: name one data set")
        parts = {part: [arrow_tables.read(file) for file in found] for part, found in splits.items() if found}
        return arrow_tables.from_parts(parts, sizes, name=str(path))
    if (path / "train").is_dir():
        return from_images(path, sizes)
    raise UserError(f"folder {str(path)!r} holds neither train-*.parquet files nor train/CLASS/ folders of images")
