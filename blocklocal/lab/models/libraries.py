"""Models of other libraries, with random weights and without a network: timm, torchvision, transformers."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from blocklocal.lab.errors import UserError


def timm(name: str, *, channels: int, size: tuple[int, int], classes: int, **arguments: Any) -> nn.Module:
    package = _package("timm", model=f"timm:{name}")
    if not package.is_model(name):
        raise UserError(f"unknown model 'timm:{name}': choose one of timm.list_models()")
    return package.create_model(name, in_chans=channels, num_classes=classes, **arguments)


def torchvision(name: str, *, channels: int, size: tuple[int, int], classes: int, **arguments: Any) -> nn.Module:
    package = _package("torchvision", model=f"torchvision:{name}")
    if name not in package.models.list_models(module=package.models):
        raise UserError(f"unknown model 'torchvision:{name}': choose one of torchvision.models.list_models()")
    if channels != 3:
        raise UserError(f"model 'torchvision:{name}' takes colour images, but these have {channels} channel(s)")
    return package.models.get_model(name, weights=None, num_classes=classes, **arguments)


def hugging_face(name: str, *, channels: int, size: tuple[int, int], classes: int, **arguments: Any) -> nn.Module:
    """The image classifier of a configuration: a folder with config.json or a JSON file, or the name of a class or kind
    of model, "ViTConfig" or "vit". Channels, image size and classes follow the data, and `arguments` set further
    fields. Its forward pass returns logits."""
    transformers = _package("transformers", model=f"hf:{name}")
    config = _config(transformers, name)
    kind = transformers.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING.get(type(config), None)
    if kind is None:
        raise UserError(f"model 'hf:{name}': transformers has no image classifier for {type(config).__name__}")
    shape = {"num_channels": channels, "image_size": size[0] if size[0] == size[1] else list(size)}
    fields = {field: value for field, value in shape.items() if hasattr(config, field)} | arguments
    for field, value in fields.items():
        if not hasattr(config, field):
            near = " or ".join(map(repr, get_close_matches(field, vars(config), cutoff=0.5)))
            meant = f", did you mean {near}?" if near else ""
            raise UserError(f"model 'hf:{name}': {type(config).__name__} has no field {field!r}{meant}")
        setattr(config, field, value)
    config.num_labels = classes
    return type(kind.__name__, (kind,), {"forward": _logits(kind)})(config)


LIBRARIES: dict[str, Callable[..., nn.Module]] = {"timm": timm, "torchvision": torchvision, "hf": hugging_face}


def _config(transformers: ModuleType, name: str) -> Any:
    if Path(name).exists():
        return transformers.AutoConfig.from_pretrained(name, local_files_only=True, trust_remote_code=False)
    kinds: Mapping[str, Any] = transformers.CONFIG_MAPPING
    if name in kinds:
        return kinds[name]()
    found = getattr(transformers, name, None) if name.endswith("Config") else None
    if not (isinstance(found, type) and issubclass(found, transformers.PretrainedConfig)):
        raise UserError(
            f"unknown model 'hf:{name}': pass a folder with config.json, a JSON file, or the name of a configuration "
            "such as hf:vit or hf:ViTConfig"
        )
    return found()


def _logits(kind: type[nn.Module]) -> Callable[[Any, Tensor], Tensor]:
    def forward(self: Any, pixel_values: Tensor) -> Tensor:
        return kind.forward(self, pixel_values).logits

    return forward


def _package(name: str, *, model: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        raise UserError(f"model {model!r} needs the package {name}: pip install {name}") from error
