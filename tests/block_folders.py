"""Blocks that are trained one after another by the command, on few samples."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from blocklocal.lab.cli import main
from blocklocal.lab.one_block.folder import BlockRun
from blocklocal.lab.settings import Settings
from blocklocal.lab.training.recipes import recipe

POEM = "The quick brown fox jumps over the lazy dog; naïve cats – all of them – nap.\n"


def settings_of(kind: str, folder: Path) -> Settings:
    """Of a tiny run on images, text or a table with classes or numbers to predict, in three blocks."""
    if kind == "text":
        (folder / "poem.txt").write_text(POEM * 40, encoding="utf-8")
        small = {"model": "gpt-tiny", "context": 16, "windows": 48, "epochs": 2, "test_size": 10, "blocks": 3}
        return replace(recipe(f"text:{folder / 'poem.txt'}"), **small)
    if kind == "table":
        return replace(recipe("table:wine"), epochs=2, at=("layer1", "layer2"))
    if kind == "numbers":
        return replace(recipe("table:diabetes"), epochs=2, at=("layer1", "layer2"))
    small = {"model": "cnn", "epochs": 2, "train_size": 100, "test_size": 60, "batch_size": 16, "crop": 2, "flip": True}
    return replace(Settings(threads=1), at=("layer1", "layer2"), **small)


def options(settings: Settings) -> list[str]:
    """The command line that gives these settings."""
    base = recipe(settings.data)
    given = [settings.data]
    for name, value in vars(settings).items():
        if name == "data" or value == getattr(base, name):
            continue
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            given.append(f"--{'' if value else 'no-'}{flag}")
        elif isinstance(value, tuple):
            given += [f"--{flag}", *value]
        else:
            given += [f"--{flag}", str(value)]
    return given


def train_chain(
    folder: Path, settings: Settings, *, blocks: int = 3, views: int = 0, dtype: str = "fp32"
) -> list[BlockRun]:
    """The folders b0, b1, ... of blocks, each trained on the cache b0-cache, b1-cache, ... behind the one before."""
    for k in range(blocks):
        source = options(settings) if k == 0 else ["--from", str(folder / f"b{k - 1}-cache")]
        assert main(["train", "--only", str(k), *source, "--out", str(folder / f"b{k}")]) == 0
        if k < blocks - 1:
            stored = ["--views", str(views or settings.epochs)] if k == 0 else []
            assert main(["cache", str(folder / f"b{k}"), "--yes", "--dtype", dtype, *stored]) == 0
    return [BlockRun(folder / f"b{k}") for k in range(blocks)]
