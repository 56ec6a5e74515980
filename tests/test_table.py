"""Tables from files and from scikit-learn, against pandas; a run on one."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from blocklocal.lab.cli import main
from blocklocal.lab.data.table import load_table
from blocklocal.lab.errors import UserError
from blocklocal.lab.settings import Settings
from blocklocal.lab.tasks.find import load_task
from blocklocal.lab.training.experiment import check_data


def write(folder: Path, table: pd.DataFrame, *, name: str = "table.csv") -> str:
    file = folder / name
    table.to_parquet(file) if name.endswith("parquet") else table.to_csv(file, index=False)
    return str(file)


def frame(rows: int = 50) -> pd.DataFrame:
    numbers = np.random.default_rng(0)
    return pd.DataFrame(
        {
            "size": numbers.normal(5.0, 3.0, rows),
            "colour": numbers.choice(["red", "green", "blue"], rows),
            "count": np.where(np.arange(rows) % 7, numbers.integers(0, 9, rows), np.nan),
            "same": 4.0,
            "kind": [("no", "yes")[i % 2] for i in range(rows)],
        }
    )


def test_every_fifth_row_of_a_class_is_for_testing(tmp_path):
    data = load_table(write(tmp_path, frame()), target=None)
    assert data.classes == ("no", "yes")
    assert (len(data.train), len(data.test)) == (40, 10)
    assert data.test.labels.tolist() == [0, 1] * 5
    same = load_table(write(tmp_path, frame(), name="table.parquet"), target="kind")
    assert torch.equal(same.train.inputs, data.train.inputs)


def test_columns_have_mean_0_and_deviation_1_over_the_training_rows(tmp_path):
    table = frame()
    data = load_table(write(tmp_path, table), target="kind")
    rows = [i for i in range(50) if i // 2 % 5 != 4]
    numbers = pd.get_dummies(table.drop(columns="kind"), columns=["colour"], dtype=float).iloc[rows]
    expected = ((numbers - numbers.mean()) / numbers.std(ddof=0).replace(0.0, 1.0)).fillna(0.0)
    deviation = np.sqrt(((numbers - numbers.mean()) ** 2).fillna(0.0).mean()).replace(0.0, 1.0)
    expected = ((numbers - numbers.mean()) / deviation).fillna(0.0)
    torch.testing.assert_close(data.train.inputs, torch.tensor(expected.to_numpy(), dtype=torch.float32))
    assert data.train.inputs.shape[1] == 6
    assert data.test.inputs.isfinite().all()


def test_a_table_with_another_value_is_not_taken_for_that_of_a_run(tmp_path):
    def task(table, name):
        return load_task(Settings(data=f"table:{write(tmp_path, table, name=name)}"), device=torch.device("cpu"))

    run = {"data": task(frame(), "table.csv").facts}
    check_data(task(frame(), "table.parquet"), run)
    other = frame()
    other.loc[31, "size"] += 1e-9
    with pytest.raises(UserError, match=r"is not what the run was trained on: digest"):
        check_data(task(other, "other.csv"), run)


def test_scikit_learns_tables_train(tmp_path, capsys):
    command = ["train", "table:iris", "--epochs=8", "--blocks=2", "--validation=20", f"--out={tmp_path / 'run'}"]
    assert main(command) == 0
    said = capsys.readouterr()
    assert json.loads(said.out)["accuracy"] > 0.8
    assert "100 training and 30 test rows of 4 numbers, 3 classes" in said.err
    assert main(["eval", str(tmp_path / "run")]) == 0
    facts = json.loads((tmp_path / "run" / "config.json").read_text())["data"]
    assert facts["classes"] == ["setosa", "versicolor", "virginica"]


@pytest.mark.parametrize(
    ("change", "target", "words"),
    [
        (lambda t: t, "weight", "has no column 'weight': --target is one of size, colour"),
        (lambda t: t.assign(name=[f"name {i}" for i in range(len(t))], kind=t.kind), "name", "no classes to learn"),
        (lambda t: t.assign(kind=[None, *t.kind[1:]]), "kind", "row 0 has no class"),
        (lambda t: t.assign(kind="one"), "kind", "has 1 different values"),
        (lambda t: t.assign(size=[np.inf, *t["size"][1:]]), "kind", "row 0 of column 'size' is infinite"),
        (lambda t: t[["kind"]], "kind", "columns: features and a target needed"),
        (lambda t: t[:0], "kind", "has 0 rows"),
    ],
)
def test_what_is_no_table_of_classes_is_refused(tmp_path, change, target, words):
    with pytest.raises(UserError, match=words):
        load_table(write(tmp_path, change(frame())), target=target)


def test_too_many_words_are_refused(tmp_path):
    table = frame(400).assign(name=[f"name {i}" for i in range(400)])
    with pytest.raises(UserError, match="column 'name' holds 400 different words, more than 100: remove it"):
        load_table(write(tmp_path, table), target="kind")


def test_what_cannot_be_read_is_refused(tmp_path):
    (tmp_path / "bad.parquet").write_bytes(b"no parquet")
    (tmp_path / "bad.csv").write_text("")
    for name in ("bad.parquet", "bad.csv"):
        with pytest.raises(UserError, match="cannot be read as a table"):
            load_table(str(tmp_path / name), target=None)
    with pytest.raises(UserError, match="no such file, and scikit-learn's are iris, wine, breast_cancer, diabetes"):
        load_table("titanic", target=None)
