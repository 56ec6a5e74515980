"""Models by name: built in, of another library, or any function."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import chdir
from functools import partial
from typing import Any

from torch import nn

from blocklocal.lab.errors import UserError, blame
from blocklocal.lab.models.hugging_face import image_classifier
from blocklocal.lab.models.libraries import timm, torchvision
from blocklocal.lab.models.resnet import BasicBlock, Bottleneck, ResNet
from blocklocal.lab.models.small import cnn, mlp
from blocklocal.lab.models.vgg import vgg8
from blocklocal.lab.models.vit import VisionTransformer
from blocklocal.lab.own_code import own_function


def _resnet(block: type[BasicBlock | Bottleneck], depths: tuple[int, ...], *, width: int) -> Callable[..., nn.Module]:
    def build(*, channels: int, size: tuple[int, int], classes: int) -> ResNet:
        return ResNet(block, depths, width=width, channels=channels, classes=classes)

    return build


MODELS: dict[str, Callable[..., nn.Module]] = {
    "mlp": mlp,
    "cnn": cnn,
    "vgg8": vgg8,
    "resnet18": _resnet(BasicBlock, (2, 2, 2, 2), width=64),
    "resnet34": _resnet(BasicBlock, (3, 4, 6, 3), width=64),
    "resnet50": _resnet(Bottleneck, (3, 4, 6, 3), width=64),
    "resnet8": _resnet(BasicBlock, (1, 1, 1), width=16),
    "resnet20": _resnet(BasicBlock, (3, 3, 3), width=16),
    "resnet32": _resnet(BasicBlock, (5, 5, 5), width=16),
    "resnet56": _resnet(BasicBlock, (9, 9, 9), width=16),
    "resnet110": _resnet(BasicBlock, (18, 18, 18), width=16),
    "vit": VisionTransformer,
}

LIBRARIES: dict[str, Callable[..., nn.Module]] = {"timm": timm, "torchvision": torchvision, "hf": image_classifier}

# Cuts by model and number of blocks; for others the library balances the blocks. The paper's ResNet-50 has four
# bottlenecks in each block; vgg8 in eight blocks has one block per layer.
CUTS: dict[tuple[str, int], tuple[str, ...]] = {
    ("mlp", 4): ("layer1", "layer2", "layer3"),
    ("cnn", 4): ("layer1", "layer2", "layer3"),
    ("vgg8", 8): ("layer1", "layer2", "layer3", "layer4", "layer5", "layer6", "layer7"),
    ("resnet18", 4): ("layer1", "layer2", "layer3"),
    ("resnet34", 4): ("layer1", "layer2", "layer3"),
    ("resnet50", 4): ("layer2.0", "layer3.0", "layer3.4"),
}


def build(
    name: str,
    *,
    channels: int,
    size: tuple[int, int],
    classes: int,
    arguments: Mapping[str, Any] = {},
) -> nn.Module:
    """Build a new model for images with `channels` and `size` (height, width) in pixels, with `classes` logits.

    name: one of `MODELS`, `timm:NAME`, `torchvision:NAME`, `hf:CONFIG`, or `package.module:function`, a function that
    is called with channels=, size=, classes= and returns the module. arguments: more for the function that makes it.
    UserError: no such model, package or function, or one that fails.
    """
    source, colon, function = name.partition(":")
    if name not in MODELS and not colon:
        if name.startswith("gpt-"):
            raise UserError(f"model {name!r} is for text, and the data are not: name them text:FILE")
        raise UserError(
            f"unknown model {name!r}: choose {', '.join(MODELS)}, "
            "timm:NAME, torchvision:NAME, hf:CONFIG or package.module:function"
        )
    known = MODELS | ({name: partial(LIBRARIES[source], function)} if source in LIBRARIES else {})
    return make(name, known, {"channels": channels, "size": size, "classes": classes}, arguments)


def make(
    name: str,
    known: Mapping[str, Callable[..., nn.Module]],
    shape: Mapping[str, Any],
    arguments: Mapping[str, Any],
) -> nn.Module:
    """Make a model with one of the known functions of that name, or with the user's own package.module:function.

    shape: the arguments that follow from the data. UserError: the function fails, or returns no module; an argument
    that follows from the data.
    """
    if taken := [argument for argument in arguments if argument in shape]:
        raise UserError(f"model {name!r}: {taken[0]!r} follows from the data and is no further argument")
    with blame(f"model {name!r} cannot be made"):
        if name in known:
            model = known[name](**shape, **arguments)
        else:
            with chdir("."):  # restores the folder to which the relative paths of the command line refer
                function = own_function(name, kind="model", keywords=tuple(shape))
                model = function(**shape, **arguments)
    if inspect.iscoroutine(model):
        model.close()
        raise UserError(f"model {name!r}: its function is async and returns no module: define it with def alone")
    if not isinstance(model, nn.Module):
        kind = f"the class {model.__name__}" if isinstance(model, type) else f"an object of type {type(model).__name__}"
        raise UserError(f"model {name!r}: its function returns {kind}, not a torch.nn.Module")
    return model


def read_arguments(given: Sequence[str]) -> dict[str, Any]:
    """Arguments from the command line, NAME=VALUE: a value is a Python literal, and otherwise text.

    UserError: one without a name or a value, or a name that is given twice.
    """
    found: dict[str, Any] = {}
    for one in given:
        name, equals, text = one.partition("=")
        if not name.isidentifier() or not equals or not text:
            raise UserError(f"--model-args {one!r} is not NAME=VALUE, such as img_size=32")
        if name in found:
            raise UserError(f"--model-args has {name} twice")
        try:
            found[name] = ast.literal_eval(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            found[name] = text
    return found


def is_own(name: str) -> bool:
    """Whether the name is that of the user's own function, package.module:function."""
    source, colon, _ = name.partition(":")
    return name not in MODELS and bool(colon) and source not in LIBRARIES
