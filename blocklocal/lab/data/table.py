"""Tables of numbers and words with a column of classes or numbers: CSV, Parquet, or scikit-learn's own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
import torch

from blocklocal.arguments import first_line
from blocklocal.lab.data.dataset import Dataset, Split, digest, sample
from blocklocal.lab.errors import UserError

OWN = ("iris", "wine", "breast_cancer", "diabetes")  # of scikit-learn
CLASSES = 20  # different whole numbers at most that are taken for classes
WORDS = 100  # different ones at most in a column of words
TEST = 5  # one row in this number is for testing

TargetType = Literal["auto", "classes", "numbers"]


def load_table(
    name: str, *, target: str | None, target_type: TargetType = "auto", train_size: int = 0, test_size: int = 0
) -> Dataset:
    """Load a table by the name of a file, or one of `OWN`; every fifth row, of each class, is for testing.

    target: the column to predict, the last one by default. target_type: what it holds; by default numbers, if they have
    fractions or more than `CLASSES` different values, else classes. Labels of classes are int64 (N,), numbers are
    float64 (N, 1) as they are in the table, and there are no classes.

    Columns of words become one number for each word, 0 or 1. All are brought to mean 0 and deviation 1 over the
    training rows; where a value is missing, it is the mean.
    UserError: no such file or column; a column of words with more than `WORDS`; classes that are no classes, or numbers
    that are no numbers.
    """
    table = _read(name)
    target = table.columns[-1] if target is None else target
    if target not in table.columns:
        raise UserError(f"data 'table:{name}' has no column {target!r}: --target is one of {', '.join(table.columns)}")
    column = table[target]
    assert isinstance(column, pd.Series)  # the names of columns differ
    where = f"data 'table:{name}', column {column.name!r}"
    numbers = target_type == "numbers" or (target_type == "auto" and _are_numbers(column))
    classes, labels = ((), _numbers(column, where=where)) if numbers else _classes(column, where=where)
    features = _features(table.drop(columns=target), name=name)
    test = torch.zeros(len(labels), dtype=torch.bool)
    kinds = [(labels == label).nonzero() for label in range(len(classes))] or [torch.arange(len(labels))]
    for rows in kinds:
        test[rows[TEST - 1 :: TEST]] = True
    if not test.any():
        kind = f"class of {TEST} rows" if classes else f"{TEST} rows"
        raise UserError(f"data 'table:{name}' has no {kind}, and so none to test on")
    train = Split(features[~test], labels[~test])
    mean = train.inputs.nanmean(0)
    deviation = (train.inputs - mean).nan_to_num().square().mean(0).sqrt()
    scale = torch.where(deviation > 0, deviation, torch.ones_like(deviation))
    parts = (train, Split(features[test], labels[test]))
    train, held = (replace(part, inputs=((part.inputs - mean) / scale).nan_to_num().float()) for part in parts)
    rows = sample(len(train), size=train_size)
    content = digest(features, labels)  # before the mean and the deviation, whose last bits depend on the machine
    return Dataset(f"table:{name}", classes, train.of(rows), held.sample(test_size), digest=content)


def _read(name: str) -> pd.DataFrame:
    if name in OWN:
        from sklearn import datasets

        table = getattr(datasets, f"load_{name}")(as_frame=True)
        named = {"target": [str(table.target_names[i]) for i in table.target]} if "target_names" in table else {}
        return table.frame.assign(**named)
    file = Path(name)
    if not file.is_file():
        raise UserError(f"data 'table:{name}': there is no such file, and scikit-learn's are {', '.join(OWN)}")
    try:
        table = pd.read_parquet(file) if file.suffix == ".parquet" else pd.read_csv(file)
    except (ValueError, OSError) as error:  # pandas' own and pyarrow's errors are among them
        raise UserError(f"{name!r} cannot be read as a table ({first_line(error)})") from error
    table.columns = table.columns.map(str)
    if len(table.columns) < 2 or not len(table):
        raise UserError(f"{name!r} has {len(table)} rows of {len(table.columns)} columns: features and a target needed")
    if not table.columns.is_unique:
        raise UserError(f"{name!r} has two columns of one name: {table.columns[table.columns.duplicated()][0]!r}")
    return table


def _are_numbers(column: pd.Series) -> bool:
    """Whether a column holds numbers to predict, and not words or a few whole numbers that stand for classes."""
    if not pd.api.types.is_numeric_dtype(column) or pd.api.types.is_bool_dtype(column):
        return False
    known = column.dropna().to_numpy(dtype=float)
    whole = np.isfinite(known).all() and (known % 1 == 0).all()
    return not whole or len(np.unique(known)) > CLASSES


def _numbers(column: pd.Series, *, where: str) -> torch.Tensor:
    """(N, 1), in double precision."""
    if not pd.api.types.is_numeric_dtype(column):
        raise UserError(f"{where} holds words: leave --target-type numbers out, or choose another with --target")
    found = column.to_numpy(dtype=float, na_value=float("nan"))
    for fault, rows in (("has no number", np.isnan(found)), ("is infinite", np.isinf(found))):
        if rows.any():
            raise UserError(f"{where}: row {int(rows.argmax())} {fault}: fill it in, or remove the row")
    return torch.tensor(found)[:, None]


def _classes(column: pd.Series, *, where: str) -> tuple[tuple[str, ...], torch.Tensor]:
    """The names of the classes, in order, and the label of each row."""
    if column.isna().any():
        raise UserError(f"{where}: row {int(column.isna().to_numpy().argmax())} has no class")
    codes, names = pd.factorize(column, sort=True)
    if len(names) < 2 or len(names) > len(column) // 2:
        raise UserError(f"{where} has {len(names)} different values in {len(column)} rows: no classes to learn")
    return tuple(map(str, names)), torch.tensor(codes, dtype=torch.int64)


def _features(table: pd.DataFrame, *, name: str) -> torch.Tensor:
    """(N, F) in double precision, nan where a value is missing."""
    words = [str(column) for column in table if not pd.api.types.is_numeric_dtype(table[column])]
    for column in words:
        count = len(set(table[column].dropna()))
        if count > WORDS:
            raise UserError(
                f"data 'table:{name}', column {column!r} holds {count} different words, more than {WORDS}: remove it"
            )
    encoded = pd.get_dummies(table, columns=words, dtype=float) if words else table
    found = torch.tensor(encoded.to_numpy(dtype=float, na_value=float("nan")))
    if found.isinf().any():
        row, column = found.isinf().nonzero()[0].tolist()
        raise UserError(f"data 'table:{name}': row {row} of column {encoded.columns[column]!r} is infinite")
    return found
