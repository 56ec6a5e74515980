"""Loads a data set by name, decoded once and checked."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path

from blocklocal.lab.data.dataset import Dataset, Sizes, Split, digest
from blocklocal.lab.errors import UserError


def load(name: str, *, train_size: int = 0, test_size: int = 0, validation: int = 0) -> Dataset:
    """Load the data set of that name: `digits`, a hub name of `sources.HUB`, `hf:OWNER/NAME`, or a folder.

    train_size, test_size: number of images in the sample to keep, see `sample`. validation: number of training images
    to hold out, see `Dataset.hold_out`.
    UserError: no such data set or folder, files that cannot be read, images or labels that do not fit together.
    """
    from blocklocal.lab.data import sources  # here, since what reads files and hub takes time to import

    sizes = Sizes(train_size, test_size)
    if name == "digits":
        dataset = sources.digits(sizes)
    elif name in sources.HUB:
        dataset = sources.hub(sources.HUB[name], sizes)
    elif re.fullmatch(r"hf:\w[\w.-]*/\w[\w.-]*", name):  # a path would be taken for a folder of this machine
        dataset = sources.hub(name.removeprefix("hf:"), sizes)
    elif os.path.isdir(name):
        dataset = sources.folder(Path(name), sizes)
    elif os.path.exists(name):
        raise UserError(f"data {name!r} is a file: name the folder that holds train-*.parquet or train/CLASS/ images")
    else:
        known = ", ".join(["digits", *sources.HUB])
        raise UserError(f"unknown data {name!r}: neither one of {known}, nor hf:OWNER/NAME, nor an existing folder")
    tensors = (tensor for _, split in _splits(dataset) for tensor in (split.inputs, split.labels))
    return _checked(replace(dataset, name=name, digest=digest(*tensors)).hold_out(validation))


def _checked(dataset: Dataset) -> Dataset:
    shapes = {part: tuple(split.inputs.shape[1:]) for part, split in _splits(dataset)}
    if shapes["train"] != shapes["test"]:
        raise UserError(
            f"data {dataset.name!r}: training images have shape {shapes['train']} and test images {shapes['test']} "
            "(channels, height, width); bring them to one shape"
        )
    for part, split in _splits(dataset):
        outside = (split.labels < 0) | (split.labels >= len(dataset.classes))
        if outside.any():
            row = int(outside.nonzero()[0])
            raise UserError(
                f"data {dataset.name!r}: label {int(split.labels[row])} of {part} image {row} is out of range, "
                f"labels are 0 to {len(dataset.classes) - 1}"
            )
    if len(dataset.train.labels.unique()) < 2:
        only = dataset.classes[int(dataset.train.labels[0])]
        raise UserError(f"data {dataset.name!r}: all training images are of class {only!r}, two classes are needed")
    return dataset


def _splits(dataset: Dataset) -> tuple[tuple[str, Split], tuple[str, Split]]:
    return ("train", dataset.train), ("test", dataset.test)
