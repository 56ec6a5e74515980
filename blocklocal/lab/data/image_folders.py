"""Folders of images train/CLASS/* and test/CLASS/*, and functions that find and read files."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from blocklocal.arguments import first_line
from blocklocal.lab.data.dataset import TEST_NAMES, Dataset, Sizes, Split, sample
from blocklocal.lab.data.decode import decode
from blocklocal.lab.errors import UserError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff")


def from_images(path: Path, sizes: Sizes) -> Dataset:
    """UserError: no test images, a class without training images, a test class that is not trained."""
    test = next((name for name in TEST_NAMES if (path / name).is_dir()), None)
    if test is None:
        raise UserError(f"folder {str(path)!r} has train/ but none of {', '.join(TEST_NAMES)}: add test/CLASS/ images")
    classes, tested = _classes(path / "train"), _classes(path / test)
    strangers = [name for name in tested if name not in classes]
    if strangers:
        raise UserError(f"{str(path / test)!r} has class {strangers[0]!r}, which train/ has not")
    train_files, test_files = (
        [
            (file, label)
            for label, name in enumerate(classes)
            if name in names
            for file in sorted(walk(path / part / name, suffixes=SUFFIXES))
        ]
        for part, names in (("train", classes), (test, tested))
    )
    untrained = sorted(set(range(len(classes))) - {label for _, label in train_files})
    if untrained:
        raise UserError(
            f"no images in {str(path / 'train' / classes[untrained[0]])!r}: take the folder out, or fill it with "
            f"files *{{{','.join(SUFFIXES)}}}"
        )

    def split(files: Sequence[tuple[Path, int]], *, part: str, size: int) -> Split:
        if not files:
            raise UserError(
                f"no images in {str(path / part)!r}: they are sought in {part}/CLASS/*{{{','.join(SUFFIXES)}}}"
            )
        kept = [files[i] for i in sample(len(files), size=size).tolist()]
        return Split(decode((str(file), read(file)) for file, _ in kept), torch.tensor([label for _, label in kept]))

    return Dataset(
        name=str(path),
        classes=classes,
        train=split(train_files, part="train", size=sizes.train),
        test=split(test_files, part=test, size=sizes.test),
    )


def walk(folder: Path, *, suffixes: Sequence[str], above: frozenset[str] = frozenset()) -> Iterator[Path]:
    """The files with these suffixes in a folder and its subfolders; names that begin with a dot are skipped.

    UserError: a folder that cannot be read or links to a parent folder, or something with such a suffix that is not a
    file.
    """
    place = os.path.realpath(folder)
    if place in above:
        raise UserError(f"{str(folder)!r} is a link to a folder that contains it: remove it")
    for entry, is_folder in _entries(folder):
        if entry.suffix.lower() in suffixes:
            check_regular(entry)
            yield entry
        elif is_folder:
            yield from walk(entry, suffixes=suffixes, above=above | {place})


def read(file: Path) -> bytes:
    """UserError: it cannot be read."""
    try:
        return file.read_bytes()
    except OSError as error:
        raise _unreadable(file, error) from error


def check_regular(file: Path) -> None:
    """Check that this is a file. UserError: it is not, such as a pipe, which might never end."""
    try:
        regular = stat.S_ISREG(file.stat().st_mode)
    except OSError as error:
        raise _unreadable(file, error) from error
    if not regular:
        raise UserError(f"{str(file)!r} is not a regular file: remove it or rename it")


def _classes(part: Path) -> tuple[str, ...]:
    entries = list(_entries(part))
    for entry, is_folder in entries:
        if not is_folder and entry.suffix.lower() in SUFFIXES:
            raise UserError(f"{str(entry)!r} is in the folder of no class: images belong in {part.name}/CLASS/")
    return tuple(sorted(entry.name for entry, is_folder in entries if is_folder))


def _entries(folder: Path) -> list[tuple[Path, bool]]:
    """The entries of a folder, and whether each is a folder itself."""
    try:
        with os.scandir(folder) as entries:
            return [(folder / entry.name, entry.is_dir()) for entry in entries if not entry.name.startswith(".")]
    except OSError as error:
        raise _unreadable(folder, error) from error


def _unreadable(path: Path, error: OSError) -> UserError:
    return UserError(f"{str(error.filename or path)!r} cannot be read ({error.strerror or first_line(error)})")
