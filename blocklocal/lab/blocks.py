"""`bll blocks`: where a model is cut, and what every block costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from tyro.conf import Positional

from blocklocal import split
from blocklocal.balance import measure
from blocklocal.lab import models
from blocklocal.lab.arguments import parse
from blocklocal.lab.errors import UserError


@dataclass(frozen=True)
class Options:
    """Show the blocks of a model: what is in them, their parameters, the memory of their activations, their time."""

    model: Positional[str]
    """mlp, cnn, vit, resnet18/34/50, resnet20/32/56/110, timm:NAME, torchvision:NAME or package.module:function"""
    blocks: int = 4
    """number of blocks"""
    at: tuple[str, ...] = ()
    """submodules after which to cut, instead of --blocks"""
    channels: int = 3
    """colour channels of the images"""
    size: int = 32
    """height and width of the images in pixels"""
    classes: int = 10
    """number of classes"""
    batch_size: int = 32
    """images in the batch that is measured"""


def main(args: Sequence[str]) -> None:
    options = parse(Options, args, prog="bll blocks")
    for name in ("blocks", "channels", "size", "classes", "batch_size"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(options, name)} is out of range: 1 or more")
    size = (options.size, options.size)
    model = models.build(options.model, channels=options.channels, size=size, classes=options.classes)
    example = torch.randn(options.batch_size, options.channels, *size, generator=torch.Generator().manual_seed(0))
    at = options.at or models.CUTS.get((options.model, options.blocks))
    try:
        chain = split(model, at=at, blocks=None if at else options.blocks, example=example, balance="memory")
    except ValueError as error:
        raise UserError(f"model {options.model!r}: {error}") from error
    Console().print(table(model, list(chain), example))


def table(model: nn.Module, blocks: list[nn.Module], example: torch.Tensor) -> Table:
    """One row per block."""
    profile = measure(blocks, example)
    seconds = sum(profile.seconds)
    rows = Table("block", "submodules", title=f"batch of {len(example)}", title_justify="right")
    for column in ("parameters", "activation MiB", "time"):
        rows.add_column(column, justify="right")
    for k, block in enumerate(blocks):
        rows.add_row(
            str(k),
            ", ".join(submodules(model, block)),
            f"{sum(parameter.numel() for parameter in block.parameters()):,}",
            f"{profile.memory(k, k) / 2**20:,.2f}",
            f"{profile.seconds[k] / seconds:.0%}",
        )
    return rows


def submodules(model: nn.Module, block: nn.Module) -> list[str]:
    """The largest submodules of the model whose parameters are all in the block."""
    own = set(block.parameters())
    names: list[str] = []
    for name, module in model.named_modules():
        parameters = set(module.parameters())
        inside = any(name.startswith(f"{whole}.") for whole in names)
        if name and parameters and parameters <= own and not inside:
            names.append(name)
    return names or ["all"]
