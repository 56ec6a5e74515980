"""The folder of a run: config.json, metrics.jsonl, model.safetensors, checkpoint/.

A file is written under another name and renamed, so that a kill at any moment leaves the last good one.
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
    def exists(self) -> bool:
        return os.path.exists(self.config)  # where a path cannot be, there is none

    def refuse(self) -> None:
        """UserError: a run is there already, or what is left of one."""
        if self.exists:
            raise UserError(
                f"{str(self.path)!r} already holds a run: go on with --resume, or choose another folder with --out"
            )
        for file in (self.metrics, self.model):
            if os.path.lexists(file):
                raise UserError(f"{str(file)!r} is of a run that has no config.json: choose another folder with --out")

    def alone(self, *, timeout: float = lock.MOMENT) -> AbstractContextManager[None]:
        """Hold the folder: whoever writes does so from the first file to the last. UserError: see `lock.alone`."""
        return lock.alone(self.path, timeout=timeout)

    def create(self, settings: Settings, *, facts: dict[str, Any]) -> None:
        """A new run with these settings; `facts` stand beside them in config.json. OSError: nothing is left of it."""
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        content = json.dumps({"settings": encode(settings), **facts}, indent=2)
        try:
            outputs.write(self.config, lambda path: path.write_text(content + "\n"))
        except OSError:
            with suppress(OSError):
                self.checkpoints.rmdir()
            raise

    def facts(self) -> dict[str, Any]:
        """All that config.json says. UserError: no run here, or not one that can be read."""
        self._check()
        return schema.read_config(self.config)

    def settings(self) -> Settings:
        """UserError: no run here, or not one of this version."""
        self._check()
        return schema.read_settings(self.config)

    def records(self) -> list[dict[str, Any]]:
        """What metrics.jsonl says of each epoch, from the first on. UserError: it says something else."""
        epochs, blocks = self.settings().epochs, self.facts()["blocks"]
        if os.path.lexists(self.metrics) or self.model.exists():
            return schema.read_epochs(self.metrics, blocks=blocks, epochs=epochs)
        return []

    def append(self, record: dict[str, Any]) -> None:
        """One more line of metrics.jsonl, which is on disk before the checkpoint of that epoch. OSError: it is not."""
        try:
            with self.metrics.open("a") as file:
                file.write(json.dumps(record) + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise OSError(f"{str(self.metrics)!r} was not written ({outputs.reason(error)})") from error

    def rewind(self, *, epochs: int) -> list[dict[str, Any]]:
        """Forget what metrics.jsonl says of later epochs, which the checkpoint does not know; returns the rest.

        UserError: see `records`; an epoch that the checkpoint knows is not there.
        """
        records = self.records()
        if len(records) < epochs:
            raise UserError(
                f"{str(self.metrics)!r} says nothing of epoch {len(records) + 1}, which the checkpoint has: "
                "put the file back, or train anew with another --out"
            )
        content = self.metrics.read_bytes() if self.metrics.exists() else b""
        kept = b"".join(line + b"\n" for line in content.split(b"\n")[:epochs])
        if kept != content:
            outputs.write(self.metrics, lambda path: path.write_bytes(kept))
        return records[:epochs]

    def forget_traces(self) -> None:
        """Those of processes that the run has had before, which may have been more."""
        for file in self.traces.glob("*.jsonl"):
            file.unlink()

    def save_model(self, model: nn.Module) -> None:
        """The weights under the model's own names. OSError: they are not there."""
        outputs.write(self.model, lambda path: save_model(model, str(path)))

    def _check(self) -> None:
        if not self.exists:
            raise UserError(f"{str(self.path)!r} holds no run: it has no config.json")
