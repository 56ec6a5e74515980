"""Initial weights of a model from a file."""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from blocklocal.lab.errors import UserError


def load_weights(model: nn.Module, file: str) -> None:
    """Load the state dict in a file, .safetensors or of torch.save, into the model.

    UserError: a file that cannot be read, or whose names or shapes are not exactly those of the model, which is then
    unchanged.
    """
    given, own = _read(file), model.state_dict()
    shapes = {name: tuple(value.shape) for name, value in own.items() if isinstance(value, Tensor)}
    differing = [name for name in shapes if name in given and tuple(given[name].shape) != shapes[name]]
    wrong = [
        *_named("missing", [name for name in shapes if name not in given]),
        *_named("not in the model", [name for name in given if name not in own]),
        *(f"{name!r} has shape {tuple(given[name].shape)}, the model's {shapes[name]}" for name in differing[:1]),
    ]
    if wrong:
        raise UserError(f"--weights {file!r} does not fit the model: {'; '.join(wrong)}")
    model.load_state_dict(given, strict=False)  # state that is no tensor stays


def _read(file: str) -> Mapping[str, Tensor]:
    try:
        Path(file).open("rb").close()
        if Path(file).suffix == ".safetensors":
            return load_file(file)
        found = torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, SafetensorError, pickle.UnpicklingError, EOFError) as error:
        reason = getattr(error, "strerror", None) or "it is not a file of weights"
        raise UserError(f"--weights {file!r} cannot be read ({reason})") from error
    if not isinstance(found, Mapping) or not all(isinstance(value, Tensor) for value in found.values()):
        raise UserError(f"--weights {file!r} holds no state dict, names with tensors alone: save model.state_dict()")
    return found


def _named(what: str, names: Sequence[str], *, most: int = 3) -> list[str]:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return [f"{', '.join(map(repr, names[:most]))}{more} {what}"] if names else []
