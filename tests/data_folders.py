"""Folders of Parquet files and of images, written by hand."""

import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

PIXELS = np.random.default_rng(0)


def picture(height: int = 8, width: int = 8, channels: int = 3) -> np.ndarray:
    shape = (height, width, channels) if channels > 1 else (height, width)
    return PIXELS.integers(0, 256, shape, dtype=np.uint8)


def encode(pixels: np.ndarray, form: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, form, lossless=True)
    return file.getvalue()


def table(contents, labels, *, image="image", label="label", names=None) -> pa.Table:
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    cells = pa.array([{"bytes": content, "path": None} for content in contents], kind)
    columns = pa.table({image: cells, label: labels})
    if names:
        features = {label: {"names": names, "_type": "ClassLabel"}}
        columns = columns.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    return columns


def write(folder: Path, train: pa.Table, test: pa.Table | None = None) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    half = len(train) // 2
    pq.write_table(train[:half], folder / "train-00000-of-00002.parquet")
    pq.write_table(train[half:], folder / "train-00001-of-00002.parquet")
    pq.write_table(train if test is None else test, folder / "test-00000-of-00001.parquet")
    return str(folder)


def write_images(folder: Path, contents: dict[str, bytes]) -> str:
    """Files by their names in the folder, such as train/cat/0.png."""
    for name, content in contents.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    return str(folder)
