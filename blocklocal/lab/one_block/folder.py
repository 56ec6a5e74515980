"""The folder of a block that was trained alone: that of a run, with block.json and block.safetensors."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from blocklocal import BlockLocal
from blocklocal.lab import outputs
from blocklocal.lab.errors import UserError
from blocklocal.lab.runs import schema
from blocklocal.lab.runs.block_state import block_state
from blocklocal.lab.runs.checkpoints import Checkpoints
from blocklocal.lab.runs.folder import Run
from blocklocal.lab.settings import Settings, encode

ELSEWHERE = ("data", "device", "threads")  # settings in which blocks of one model may differ


class Upstream(TypedDict):
    """Where the activations came from that a block was trained on. digest: of the cache. blocks: of each block before.

    path: where the cache was.
    """

    path: str
    digest: str
    blocks: list[str]


class BlockFacts(TypedDict):
    """What block.json has besides the content of a config.json. trained_on: see `trained_on`."""

    block: int
    upstream: Upstream | None
    trained_on: str


@dataclass(frozen=True)
class BlockRun(Run):
    """The folder of block k alone, which need not exist yet. No other command takes it for a run."""

    @property
    def config(self) -> Path:
        return self.path / outputs.BLOCK

    @property
    def model(self) -> Path:
        return self.path / "block.safetensors"

    @property
    def block(self) -> int:
        return self.facts()["block"]

    @property
    def upstream(self) -> Upstream | None:
        return self.facts()["upstream"]

    def facts(self) -> dict[str, Any]:
        """The content of block.json. UserError: there is none, or it is not as `bll train --only` writes it."""
        found = super().facts()
        try:
            schema.convert_to(found, BlockFacts)
        except ValueError as error:
            raise UserError(f"{str(self.config)!r} is not the record of a block ({error})") from error
        return found

    def records(self) -> list[dict[str, Any]]:
        return self._records(blocks=1)

    def kept(self) -> Checkpoints:
        """Its checkpoints."""
        facts = self.facts()
        return Checkpoints(self.checkpoints, blocks=facts["blocks"], only=facts["block"])

    def save_weights(self, weights: dict[str, Tensor]) -> None:
        """Save the trained block and its border, by their names in the learner. OSError: they were not written."""
        apart = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in weights.items()}
        outputs.write(self.model, lambda path: save_file(apart, path))

    def weights(self) -> dict[str, Tensor]:
        """What `save_weights` has saved. UserError: the block is not trained to its end, or the file is damaged."""
        if not self.model.exists():
            raise UserError(
                f"{str(self.path)!r} is not trained to its end: continue with bll train --only ... --resume"
            )
        try:
            return load_file(self.model)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{str(self.model)!r} cannot be read ({error}): restore it from a copy") from error

    def _check(self) -> None:
        if not self.exists:
            what = "a whole run" if os.path.exists(self.path / outputs.CONFIG) else "no block"
            raise UserError(
                f"{str(self.path)!r} holds {what}: a folder of bll train --only is needed, which has a {outputs.BLOCK}"
            )


def weights_of(learner: BlockLocal, k: int) -> dict[str, Tensor]:
    """Parameters and buffers of block k and its border, by their names in the learner."""
    return {name: kept for name, kept in block_state(learner, k, None).items() if isinstance(kept, Tensor)}


def digest_of(weights: dict[str, Tensor]) -> str:
    """A digest of tensors by name: equal only if all are equal to the bit."""
    found = hashlib.sha256()
    for name in sorted(weights):
        tensor = weights[name].detach().cpu().contiguous()
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        found.update(tensor.flatten().view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
    return found.hexdigest()


def trained_on(settings: Settings, data: dict[str, Any], upstream: Upstream | None) -> str:
    """A digest of what decides the weights of a block: settings, facts of the data, the cache that it reads."""
    decisive = {name: value for name, value in encode(settings).items() if name not in ELSEWHERE}
    content = {"settings": decisive, "data": data, "upstream": upstream and upstream["digest"]}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
