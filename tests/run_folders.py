"""Folders of runs, written by hand as `bll train` writes them."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from blocklocal.lab.settings import Settings, encode

FACTS = {
    "data": {"training_images": 50000, "test_images": 10000, "shape": [3, 32, 32], "classes": list("0123456789")},
    "parameters": 272474,
    "blocks": 4,
    "steps": 390,
    "processes": 1,
    "versions": {"blocklocal": "0.1.0", "torch": "2.13.0"},
    "device": {"type": "cpu", "name": "some processor"},
    "git": "0123abc",
}


def write_run(
    path: Path,
    *,
    rule: str = "bll",
    seed: int = 0,
    accuracies: list[float],
    blocks: int = 4,
    epochs: int | None = None,
    angles: Mapping[str, Sequence[float | None]] | None = None,
    **settings: object,
) -> Path:
    """A run that has come through len(accuracies) epochs of `epochs`, by default all of them.

    The last exit has the accuracies that are given, each exit before it 0.1 less than the next. angles: of each layer,
    one per epoch, None where the record has none.
    """
    (path / "checkpoint").mkdir(parents=True)
    epochs = len(accuracies) if epochs is None else epochs
    stored = {"data": "data/cifar10", "model": "resnet20", "rule": rule, "seed": seed, "epochs": epochs}
    stored = encode(Settings(warmup=0.0)) | stored | settings
    (path / "config.json").write_text(json.dumps({"settings": stored, **FACTS, "blocks": blocks}))
    records = [_record(epoch, accuracy, blocks=blocks) for epoch, accuracy in enumerate(accuracies, start=1)]
    for i, record in enumerate(records):
        known = {layer: degrees[i] for layer, degrees in (angles or {}).items() if degrees[i] is not None}
        if known:
            record["angles"] = known
    (path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    if len(accuracies) == epochs:
        (path / "model.safetensors").write_bytes(b"")
    return path


def _record(epoch: int, accuracy: float, *, blocks: int) -> dict[str, object]:
    return {
        "epoch": epoch,
        "train_loss": [2.0 + k + 1 / epoch for k in range(blocks)],
        "test_accuracy": [max(0.0, accuracy - 0.1 * (blocks - 1 - k)) for k in range(blocks)],
        "test_accuracy_all": accuracy + 0.01,
        "seconds": 10.0 + epoch,
        "peak_memory_mib": 300.0 + epoch,
        "borders": [{"agreement": 0.1 * k + 0.05 * epoch, "variance_ratio": 0.5 + k} for k in range(blocks - 1)],
    }
