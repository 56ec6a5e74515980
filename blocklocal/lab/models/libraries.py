"""Models of other libraries, with random weights and without a network: timm and torchvision."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

from torch import nn

from blocklocal.lab.errors import UserError


def timm(name: str, *, channels: int, size: tuple[int, int], classes: int, **arguments: Any) -> nn.Module:
    library = package("timm", model=f"timm:{name}")
    if not library.is_model(name):
        raise UserError(f"unknown model 'timm:{name}': choose one of timm.list_models()")
    return library.create_model(name, in_chans=channels, num_classes=classes, **arguments)


def torchvision(name: str, *, channels: int, size: tuple[int, int], classes: int, **arguments: Any) -> nn.Module:
    library = package("torchvision", model=f"torchvision:{name}")
    if name not in library.models.list_models(module=library.models):
        raise UserError(f"unknown model 'torchvision:{name}': choose one of torchvision.models.list_models()")
    if channels != 3:
        raise UserError(f"model 'torchvision:{name}' takes colour images, but these have {channels} channel(s)")
    return library.models.get_model(name, weights=None, num_classes=classes, **arguments)


def package(name: str, *, model: str) -> ModuleType:
    """The package that a model needs. UserError: it is not installed."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        raise UserError(f"model {model!r} needs the package {name}: pip install {name}") from error
