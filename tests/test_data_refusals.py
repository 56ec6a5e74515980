"""Data sets that are damaged, foreign or ambiguous: each is refused in one line that names the place, or works."""

import json
import os
import sys
import tempfile
from pathlib import Path
from types import ModuleType

import pyarrow as pa
import pyarrow.parquet as pq
import pyarrow.parquet.encryption as pe
import pytest
from data_folders import encode, picture, table, write, write_images

from blocklocal.lab.data.load import load
from blocklocal.lab.errors import UserError

GOOD, PIXELS = encode(picture()), picture()
LABELS = [0, 1, 0, 1]
TWO_CLASSES = {f"{part}/{name}/0.png": GOOD for part in ("train", "test") for name in ("cat", "dog")}


def refused(folder: Path | str) -> str:
    with pytest.raises(UserError) as error:
        load(str(folder))
    return str(error.value)


def described(entry: object) -> pa.Table:
    content = entry if isinstance(entry, bytes) else json.dumps(entry)
    return table([GOOD] * 4, LABELS).replace_schema_metadata({"huggingface": content})


def named(names: object) -> pa.Table:
    return described({"info": {"features": {"label": {"names": names}}}})


def with_images(values: object, kind: pa.DataType | None = None) -> pa.Table:
    return pa.table({"image": pa.array(values, kind), "label": LABELS})


STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
PATH_ONLY = {"bytes": None, "path": "0.png"}

TABLES = {
    "label of 10^12": (table([GOOD] * 4, [0, 1, 0, 10**12]), "label 1000000000000 is out of range"),
    "label of 4": (table([GOOD] * 4, [0, 1, 0, 4]), "label 4 is out of range"),
    "negative": (table([GOOD] * 4, [0, 1, -7, 1]), "label -7 is out of range"),
    "all negative": (table([GOOD] * 4, [-1] * 4), "label -1 is out of range"),
    "negative beside names": (table([GOOD] * 4, [0, 1, -1, 1], names=["a", "b"]), "label -1 of train image 2"),
    "null": (table([GOOD] * 4, [0, None, 0, 1]), "row 1 of column 'label' holds no label"),
    "nulls only": (table([GOOD] * 4, [None] * 4), "must hold an integer for every image, it is null"),
    "unsigned": (table([GOOD] * 4, pa.array([0, 1, 0, 2**63], pa.uint64())), "label out of range"),
    "float": (table([GOOD] * 4, [0.0, 1.0, 0.5, 1.0]), "it is double"),
    "bool": (table([GOOD] * 4, [True, False] * 2), "it is bool"),
    "words": (table([GOOD] * 4, ["cat", "dog"] * 2), "it is string"),
    "lists": (table([GOOD] * 4, [[0], [1], [0, 1], []]), "it is list"),
    "dictionary": (table([GOOD] * 4, pa.array(["a", "b"] * 2).dictionary_encode()), "it is dictionary"),
    "no rows": (table([], pa.array([], pa.int64())), "no images in the split 'train'"),
    "one class": (table([GOOD] * 4, [1] * 4, names=["a", "b"]), "all training images are of class 'b'"),
    "one class of one": (table([GOOD] * 4, [0] * 4), "all training images are of class '0'"),
    "no columns": (pa.table({}), "no column image or img: it has none"),
    "no labels": (table([GOOD] * 4, LABELS).drop_columns("label"), "no column label or fine_label or labels"),
    "no images": (table([GOOD] * 4, LABELS).drop_columns("image"), "no column image or img: it has label"),
    "not JSON": (described(b"{'info'"), "entry 'huggingface' of the schema is damaged"),
    "not UTF-8": (described(b"\xff\xfe"), "entry 'huggingface'"),
    "deep": (described(b"[" * 100_000), "entry 'huggingface'"),
    "a list": (described([1, 2]), "entry 'huggingface'"),
    "null entry": (described(None), "entry 'huggingface'"),
    "features null": (described({"info": {"features": None}}), "entry 'huggingface'"),
    "features a word": (described({"info": {"features": "label"}}), "entry 'huggingface'"),
    "names a word": (named("ab"), "entry 'huggingface'"),
    "names a number": (named(2), "entry 'huggingface'"),
    "names of numbers": (named([1, 2]), "entry 'huggingface'"),
    "names with a null": (named(["a", None]), "entry 'huggingface'"),
    "fewer names": (named(["a"]), "label 1 of train image 1 is out of range, labels are 0 to 0"),
    "plain bytes": (with_images([GOOD] * 4), "must be a struct of bytes and path, it is binary"),
    "lists of bytes": (with_images([[1, 2]] * 4), "it is list"),
    "words for bytes": (with_images([{"bytes": "abc", "path": ""}] * 4), "it is struct"),
    "a struct without": (with_images([{"path": "0.png"}] * 4), "it is struct"),
    "a path only": (with_images([{"bytes": GOOD}, PATH_ONLY] * 2, STRUCT), "row 0 holds no image bytes"),
    "a null struct": (with_images([{"bytes": GOOD}, None] * 2, STRUCT), "row 0 holds no image bytes"),
    "empty bytes": (table([GOOD, GOOD, b"", GOOD], LABELS), "train-00001-of-00002.parquet, row 0 is not an image"),
}


@pytest.mark.parametrize("name", TABLES)
def test_a_table_is_refused_in_one_line(tmp_path, name):
    content, words = TABLES[name]
    if name in ("a path only", "a null struct"):  # row 1 of the whole, row 0 of its second file
        content = content.take([0, 2, 1, 3])
    write(tmp_path, content)
    said = refused(tmp_path)
    assert words in said
    assert "\n" not in said


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(table([GOOD] * 4, LABELS), id="plain"),
        pytest.param(table([GOOD] * 4, pa.array(LABELS, pa.uint8())), id="small-labels"),
        pytest.param(table([GOOD] * 4, pa.chunked_array([[0], [1, 0], [], [1]])), id="chunks"),
        pytest.param(with_images([{"bytes": GOOD}] * 4, pa.struct([("bytes", pa.large_binary())])), id="large"),
        pytest.param(table([GOOD] * 4, LABELS).append_column("more", pa.array([[{"a": [1]}]] * 4)), id="nested-column"),
        pytest.param(named(["a", "b", "never"]), id="more-names"),
        pytest.param(named([]), id="no-names"),
        pytest.param(described({"info": {}}), id="no-features"),
        pytest.param(described({"info": {"features": {"label": {"dtype": "int64"}}}}), id="another-feature"),
    ],
)
def test_a_table_that_is_whole_is_read(tmp_path, content):
    data = load(write(tmp_path, content))
    assert data.train.labels.tolist() == LABELS
    assert len(data.classes) in (2, 3)


def test_files_of_one_data_set_agree(tmp_path):
    write(tmp_path / "names", named(["a", "b"]), named(["b", "a"]))
    said = refused(tmp_path / "names")
    assert "different class names" in said
    assert "train-00000" in said
    assert "test-00000" in said
    write(tmp_path / "columns", table([GOOD] * 4, LABELS), table([GOOD] * 4, LABELS, label="fine_label"))
    assert "in column 'label', those of" in refused(tmp_path / "columns")
    for name in ("one", "other"):
        write(tmp_path / "two" / name, table([GOOD] * 4, LABELS))
    assert "name one data set" in refused(tmp_path / "two")
    unlike = write(tmp_path / "label=7", table([GOOD] * 4, LABELS))
    assert load(unlike).train.labels.tolist() == LABELS, "a path says nothing of the labels"


def test_encrypted_tables_are_named(tmp_path):
    write(tmp_path, table([GOOD] * 4, LABELS))
    keys = pe.CryptoFactory(lambda _: Vault())
    properties = keys.file_encryption_properties(
        pe.KmsConnectionConfig(), pe.EncryptionConfiguration(footer_key="k", uniform_encryption=True)
    )
    pq.write_table(
        table([GOOD] * 4, LABELS), tmp_path / "train-00000-of-00002.parquet", encryption_properties=properties
    )
    assert "train-00000-of-00002.parquet' is not a readable Parquet file" in refused(tmp_path)


class Vault(pe.KmsClient):
    def wrap_key(self, key_bytes, master_key_identifier):
        return key_bytes

    def unwrap_key(self, wrapped_key, master_key_identifier):
        return wrapped_key


def make(path: Path, kind: str) -> None:
    """In place of a file, something else."""
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "dangling link":
        path.symlink_to("nowhere")
    elif kind == "link to itself":
        path.symlink_to(path.name)
    else:
        assert kind == "socket"
        os.mknod(path, 0o140600)


@pytest.mark.parametrize("kind", ["pipe", "folder", "device", "dangling link", "link to itself", "socket"])
def test_only_files_are_read(tmp_path, kind):
    images = Path(write_images(tmp_path / "images", TWO_CLASSES))
    make(images / "train/cat/1.png", kind)
    assert "cat/1.png' " in refused(images)
    tables = Path(write(tmp_path / "tables", table([GOOD] * 4, LABELS)))
    make(tables / "train-00001-of-00002.parquet", kind)
    assert "train-00001-of-00002.parquet' " in refused(tables)


FOLDERS = {
    "one class": ({"train/cat/0.png": GOOD, "test/cat/0.png": GOOD}, "all training images are of class 'cat'"),
    "no class": ({"train/0.png": GOOD, "test/cat/0.png": GOOD}, "train/0.png' is in the folder of no class"),
    "an image beside the classes": (TWO_CLASSES | {"test/9.JPG": GOOD}, "test/9.JPG' is in the folder of no class"),
    "a class that is a file": (
        {"train/cat/0.png": GOOD, "train/dog": b"", "test/dog/0.png": GOOD},
        "test' has class 'dog', which train/ has not",
    ),
    "a class without images": (TWO_CLASSES | {"train/cow/notes.txt": b""}, "no images in"),
    "no test images": ({name: GOOD for name in TWO_CLASSES if "train" in name} | {"test/cat/a": b""}, "no images in"),
    "another size": (TWO_CLASSES | {"test/dog/1.png": encode(picture(9, 9))}, "dog/1.png is 9x9 pixels"),
    "no image": (TWO_CLASSES | {"train/dog/1.png": b"<html>"}, "dog/1.png is not an image"),
    "odd bytes": (TWO_CLASSES | {"train/dog/\udcff.png": b""}, "\udcff.png is not an image"),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_of_images_is_refused_in_one_line(tmp_path, name):
    contents, words = FOLDERS[name]
    said = refused(write_images(tmp_path, contents))
    assert words in said
    assert "\n" not in said


def test_odd_names_are_names(tmp_path):
    odd = {"Cat", "cat", "c\udcfft", "[red]", "a\nb", " "}
    data = load(write_images(tmp_path, {f"{part}/{name}/0.png": GOOD for part in ("train", "val") for name in odd}))
    assert set(data.classes) == odd
    assert len(data.train) == len(odd)


def test_hidden_files_are_no_data(tmp_path):
    hidden = {"train/.ipynb_checkpoints/0.png": GOOD, "train/cat/._0.png": b"Mac OS X", "train/cat/.old/1.png": GOOD}
    data = load(write_images(tmp_path, TWO_CLASSES | hidden | {".cache/train.parquet": b""}))
    assert data.classes == ("cat", "dog")
    assert len(data.train) == 2


def test_links_to_folders_are_followed_but_not_in_a_circle(tmp_path):
    folder = Path(write_images(tmp_path / "data", TWO_CLASSES))
    write_images(tmp_path, {"elsewhere/more/5.png": GOOD})
    (folder / "train/cat/more").symlink_to(tmp_path / "elsewhere")
    assert len(load(str(folder)).train) == 3
    (tmp_path / "elsewhere/more/back").symlink_to(folder / "train/cat")
    assert "is a link to a folder that contains it" in refused(folder)


@pytest.fixture
def as_anyone():
    """A folder in which this process may not read everything, be it root's."""
    with tempfile.TemporaryDirectory() as name:
        root = os.geteuid() == 0
        os.chmod(name, 0o755)

        def enter() -> None:
            if root:
                os.seteuid(65534)

        try:
            yield Path(name), enter
        finally:
            if root:
                os.seteuid(0)
            for path in Path(name).rglob("*"):
                path.chmod(0o755)


@pytest.mark.parametrize("closed", ["train/cat/0.png", "train/cat", "test/dog", "test", "."])
def test_what_may_not_be_read_is_named(as_anyone, closed):
    folder, enter = as_anyone
    write_images(folder / "data", TWO_CLASSES)
    (folder / "data" / closed).chmod(0)
    enter()
    said = refused(folder / "data")
    assert str(folder / "data" / closed) in said
    assert "ermission denied" in said


@pytest.mark.parametrize("name", ["", "\0", "x" * 5000, "digits/", "hf:", "hf:..", "hf:a/b/c", "hf:/etc"])
def test_names_of_no_data_set_are_refused(name):
    said = refused(name)
    assert "unknown data" in said
    assert "\n" not in said
    assert len(said) < 6000


class Hub(ModuleType):
    """In place of the package `datasets`: one repository whose splits are tables, or an error."""

    Image = type("Image", (), {"__init__": lambda self, decode: None})

    def __init__(self, splits: dict[str, pa.Table] | Exception) -> None:
        super().__init__("datasets")
        self.splits = splits

    def load_dataset(self, repository: str) -> dict[str, "HubSplit"]:
        if isinstance(self.splits, Exception):
            raise self.splits
        return {name: HubSplit(content) for name, content in self.splits.items()}


class HubSplit:
    def __init__(self, content: pa.Table) -> None:
        self.content, self.column_names = content, content.column_names
        self.features = dict.fromkeys(self.column_names)

    def with_format(self, kind: str) -> pa.Table:
        return self.content


@pytest.mark.parametrize(
    ("splits", "words"),
    [
        (IndexError("list index out of range"), "cannot get 'some/data' from the Hugging Face hub (list index"),
        (AssertionError(), "hub (AssertionError)"),
        (ConnectionError("no\nnetwork"), "hub (no)"),
        ({"train": table([GOOD] * 4, LABELS)}, "has the splits train: train and test are needed"),
        ({}, "has the splits none"),
        ({"train": table([GOOD] * 4, [0, 1, None, 1]), "test": table([GOOD], [0])}, "'some/data (train)': row 2"),
        ({"train": table([GOOD] * 4, LABELS), "test": table([GOOD], [-1])}, "label -1 of test image 0"),
        ({"train": table([GOOD] * 4, LABELS), "test": table([b"?"], [0])}, "some/data (test), row 0 is not an image"),
    ],
)
def test_what_comes_from_the_hub_is_named(monkeypatch, splits, words):
    monkeypatch.setitem(sys.modules, "datasets", Hub(splits))
    said = refused("hf:some/data")
    assert words in said
    assert "\n" not in said
