"""Models of transformers from a configuration, with random weights and without a network."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from difflib import get_close_matches
from inspect import signature
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from blocklocal.lab.errors import UserError
from blocklocal.lab.models.libraries import package

SPECIAL = ("pad_token_id", "bos_token_id", "eos_token_id")
"""Tokens that the vocabularies of the command do not have."""


def image_classifier(name: str, *, channels: int, size: tuple[int, int], classes: int, **arguments: Any) -> nn.Module:
    """The image classifier of a configuration: a folder with config.json or a JSON file, or the name of a class or kind
    of model, "ViTConfig" or "vit". Channels, image size and classes follow the data, and `arguments` set further
    fields. Its forward pass takes images alone and returns logits."""
    transformers = package("transformers", model=f"hf:{name}")
    config, written = _written(transformers, name)
    kind = transformers.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING.get(type(config), None)
    if kind is None:
        is_decoder = type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING
        remedy = ", but a language model: name the data text:FILE" if is_decoder else ""
        raise UserError(f"model 'hf:{name}': transformers has no image classifier for {type(config).__name__}{remedy}")
    data = {"num_channels": channels, "image_size": size[0] if size[0] == size[1] else list(size)}
    config = _changed(config, written, name=name, data=data, arguments=arguments)
    config.num_labels = classes
    return _with(kind, _forward_of_images(kind))(config)


def language_model(name: str, *, tokens: int, context: int, **arguments: Any) -> nn.Module:
    """The causal language model of a configuration, named as for `image_classifier`, "gpt2" or "LlamaConfig".

    Vocabulary and context follow the data, and `arguments` set further fields. It keeps no cache, and unless arguments
    say so its embeddings are not tied, since no border may separate two uses of a weight. Its forward pass takes ids
    (B, T) alone and returns logits (B, T, tokens)."""
    transformers = package("transformers", model=f"hf:{name}")
    config, written = _written(transformers, name)
    kind = transformers.MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if kind is None:
        raise UserError(f"model 'hf:{name}': transformers has no causal language model for {type(config).__name__}")
    data = {"vocab_size": tokens, "max_position_embeddings": context, "use_cache": False, "is_decoder": True}
    config = _changed(
        config,
        written,
        name=name,
        data=data | dict.fromkeys(SPECIAL),
        arguments={"tie_word_embeddings": False} | arguments,
    )
    return _with(kind, _forward_of_text(kind))(config)


def _changed(
    config: Any, written: Mapping[str, Any], *, name: str, data: Mapping[str, Any], arguments: Mapping[str, Any]
) -> Any:
    """The configuration with the fields `data`, as far as it has them, and `arguments`.

    It is made anew, since what is not written follows from other fields, as the width of a head. UserError: it has no
    such field, or the data say what it is.
    """
    own_name: Mapping[str, str] = config.attribute_map
    fields = {own_name.get(field, field): value for field, value in data.items() if hasattr(config, field)}
    for field, value in arguments.items():
        if not hasattr(config, field):
            near = " or ".join(map(repr, get_close_matches(field, vars(config), cutoff=0.5)))
            meant = f", did you mean {near}?" if near else ""
            raise UserError(f"model 'hf:{name}': {type(config).__name__} has no field {field!r}{meant}")
        if own_name.get(field, field) in fields:
            raise UserError(f"model 'hf:{name}': {field!r} follows from the data and is no further argument")
        fields[own_name.get(field, field)] = value
    return type(config).from_dict({own_name.get(field, field): value for field, value in written.items()} | fields)


def _written(transformers: ModuleType, name: str) -> tuple[Any, Mapping[str, Any]]:
    """The configuration of that name, and what its file says."""
    if Path(name).exists():
        config = transformers.AutoConfig.from_pretrained(name, local_files_only=True, trust_remote_code=False)
        return config, config.get_config_dict(name, local_files_only=True)[0]
    kinds: Mapping[str, Any] = transformers.CONFIG_MAPPING
    if name in kinds:
        return kinds[name](), {}
    found = getattr(transformers, name, None) if name.endswith("Config") else None
    if not (isinstance(found, type) and issubclass(found, transformers.PretrainedConfig)):
        raise UserError(
            f"unknown model 'hf:{name}': pass a folder with config.json, a JSON file, or the name of a configuration "
            "such as hf:vit or hf:ViTConfig, for text hf:gpt2 or hf:LlamaConfig"
        )
    return found(), {}


def _forward_of_images(kind: type[nn.Module]) -> Callable[..., Tensor]:
    def forward(self: Any, pixel_values: Tensor) -> Tensor:
        return kind.forward(self, pixel_values).logits

    return forward


def _forward_of_text(kind: type[nn.Module]) -> Callable[..., Tensor]:
    masked = "attention_mask" in signature(kind.forward).parameters

    def forward(self: Any, input_ids: Tensor) -> Tensor:
        if not masked:
            return kind.forward(self, input_ids).logits
        # Without a mask, the course of the forward pass depends on whether the batch has one sample.
        batch, length = input_ids.shape  # two numbers, which a block reads off its features
        mask = torch.ones(batch, length, dtype=torch.int64, device=input_ids.device)
        return kind.forward(self, input_ids, attention_mask=mask).logits

    return forward


def _with(kind: type[nn.Module], forward: Callable[..., Tensor]) -> Callable[[Any], nn.Module]:
    """A class of models that differs in its forward pass."""
    return type(kind.__name__, (kind,), {"forward": forward})
