"""The folder of a run: config.json, metrics.jsonl, model.safetensors, checkpoint/.

A file is written under another name and renamed, so that a kill at any moment leaves the last good one.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_model
from torch import nn

from blocklocal.lab.config import Settings, encode, restore
from blocklocal.lab.errors import UserError


@dataclass(frozen=True)
class Run:
    """A run's folder, which need not exist yet."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.json"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def model(self) -> Path:
        return self.path / "model.safetensors"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoint"

    @property
    def traces(self) -> Path:
        return self.path / "trace"

    @property
    def exists(self) -> bool:
        return self.config.exists()

    def create(self, settings: Settings, *, facts: dict[str, Any]) -> None:
        """A new run with these settings; `facts` stand beside them in config.json."""
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        content = json.dumps({"settings": encode(settings), **facts}, indent=2)
        _write(self.config, lambda path: path.write_text(content + "\n"))

    def facts(self) -> dict[str, Any]:
        """All that config.json says. UserError: no run here, or not one that can be read."""
        if not self.exists:
            raise UserError(f"{str(self.path)!r} holds no run: it has no config.json")
        try:
            return json.loads(self.config.read_text())
        except ValueError as error:
            raise self._misfit(error) from error

    def settings(self) -> Settings:
        """UserError: no run here, or not one of this version."""
        facts = self.facts()
        try:
            return restore(facts["settings"])
        except (ValueError, KeyError, TypeError) as error:
            raise self._misfit(error) from error

    def _misfit(self, error: Exception) -> UserError:
        return UserError(f"{str(self.config)!r} is not a configuration of this version ({error})")

    def append(self, record: dict[str, Any]) -> None:
        """One more line of metrics.jsonl."""
        with self.metrics.open("a") as file:
            file.write(json.dumps(record) + "\n")

    def rewind(self, *, epochs: int) -> list[dict[str, Any]]:
        """Forget what metrics.jsonl says of later epochs, which the checkpoint does not know; returns the rest.

        A half line, which a kill may leave at the end, is of such an epoch.
        """
        lines = self.metrics.read_text().split("\n")[:-1] if self.metrics.exists() else []
        records = [record for record in map(json.loads, lines) if record["epoch"] <= epochs]
        content = "".join(json.dumps(record) + "\n" for record in records)
        _write(self.metrics, lambda path: path.write_text(content))
        return records

    def save_model(self, model: nn.Module) -> None:
        """The weights under the model's own names."""
        _write(self.model, lambda path: save_model(model, str(path)))


def _write(path: Path, write: Callable[[Path], object]) -> None:
    """`write` a file beside `path`, then let it take the name."""
    part = path.with_name(f"{path.name}.part")
    write(part)
    with part.open("rb") as file:
        os.fsync(file.fileno())
    part.replace(path)
