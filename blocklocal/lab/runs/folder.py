"""The folder of a run: config.json, metrics.jsonl, model.safetensors, checkpoint/.

A file is written under another name and renamed, so a kill at any moment leaves the last valid one.
"""

from __future__ import annotations

import json
import os
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_model
from torch import nn

from blocklocal.lab import outputs
from blocklocal.lab.errors import UserError
from blocklocal.lab.runs import lock, schema
from blocklocal.lab.settings import Settings, encode
from blocklocal.lab.tasks.measure import measures_of


@dataclass(frozen=True)
class Run:
    """A run's folder, which need not exist yet."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / outputs.CONFIG

    @property
    def metrics(self) -> Path:
        return self.path / outputs.METRICS

    @property
    def model(self) -> Path:
        return self.path / outputs.MODEL

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoint"

    @property
    def traces(self) -> Path:
        return self.path / "trace"

    @property
    def events(self) -> Path:
        return self.path / outputs.EVENTS

    @property
    def exists(self) -> bool:
        return os.path.exists(self.config)  # where a path cannot be, there is none

    def refuse(self) -> None:
        """Check that the folder holds no run. UserError: it does, or the remains of one."""
        if self.exists:
            raise UserError(
                f"{str(self.path)!r} already holds a run: continue with --resume, or choose another folder with --out"
            )
        for file in (self.metrics, self.model):
            if os.path.lexists(file):
                raise UserError(f"{str(file)!r} belongs to a run without config.json: choose another folder with --out")

    def alone(self, *, timeout: float = lock.MOMENT) -> AbstractContextManager[None]:
        """Hold the lock of the folder, for as long as files are written. UserError: see `lock.alone`."""
        return lock.alone(self.path, timeout=timeout)

    def create(self, settings: Settings, *, facts: dict[str, Any]) -> None:
        """Create a run with these settings and `facts` in config.json. OSError: it failed, and nothing is left."""
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        content = json.dumps({"settings": encode(settings), **facts}, indent=2)
        try:
            outputs.write(self.config, lambda path: path.write_text(content + "\n"))
        except OSError:
            with suppress(OSError):
                self.checkpoints.rmdir()
            raise

    def facts(self) -> dict[str, Any]:
        """The content of config.json. UserError: no run here, or one that cannot be read."""
        self._check()
        return schema.read_config(self.config)

    def settings(self) -> Settings:
        """The settings of the run. UserError: no run here, or not one of this version."""
        self._check()
        return schema.read_settings(self.config)

    def records(self) -> list[dict[str, Any]]:
        """The record of each epoch in metrics.jsonl. UserError: the file is invalid."""
        return self._records(blocks=self.facts()["blocks"])

    def _records(self, *, blocks: int) -> list[dict[str, Any]]:
        settings, facts = self.settings(), self.facts()
        if not (os.path.lexists(self.metrics) or self.model.exists()):
            return []
        measures = measures_of(settings.kind, facts["data"])
        merged = "merged" in facts
        return schema.read_epochs(self.metrics, blocks=blocks, epochs=settings.epochs, measures=measures, merged=merged)

    def append(self, record: dict[str, Any]) -> None:
        """Add a line to metrics.jsonl, on disk before the checkpoint of that epoch. OSError: it was not written."""
        try:
            with self.metrics.open("a") as file:
                file.write(json.dumps(record) + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise OSError(f"{str(self.metrics)!r} was not written ({outputs.reason(error)})") from error

    def rewind(self, *, epochs: int) -> list[dict[str, Any]]:
        """Remove the records of epochs after the checkpoint from metrics.jsonl; returns the rest.

        UserError: see `records`; the record of an epoch in the checkpoint is missing.
        """
        records = self.records()
        if len(records) < epochs:
            raise UserError(
                f"{str(self.metrics)!r} has no record of epoch {len(records) + 1}, which the checkpoint includes: "
                "restore the file, or start a new run with another --out"
            )
        content = self.metrics.read_bytes() if self.metrics.exists() else b""
        kept = b"".join(line + b"\n" for line in content.split(b"\n")[:epochs])
        if kept != content:
            outputs.write(self.metrics, lambda path: path.write_bytes(kept))
        return records[:epochs]

    def forget_traces(self) -> None:
        """Remove the logs of earlier processes of the run, of which there may have been more."""
        for file in self.traces.glob("*.jsonl"):
            file.unlink()

    def save_model(self, model: nn.Module) -> None:
        """Save the weights under the model's own names. OSError: they were not written."""
        outputs.write(self.model, lambda path: save_model(model, str(path)))

    def _check(self) -> None:
        if not self.exists:
            alone = os.path.exists(self.path / outputs.BLOCK)
            held = "a block that was trained alone: bll merge puts blocks together" if alone else "no run"
            raise UserError(f"{str(self.path)!r} holds {held}" + (": it has no config.json" if not alone else ""))
