"""The options of `bll bench`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import nn
from tyro.conf import FlagCreatePairsOff

from blocklocal.lab import ranges
from blocklocal.lab.bench.baselines import Workload, find
from blocklocal.lab.errors import UserError
from blocklocal.lab.ranges import Needs, Range
from blocklocal.lab.settings import THREADS
from blocklocal.lab.training.experiment import DTYPES
from blocklocal.lab.training.trial import FEW, try_model


@dataclass(frozen=True)
class Options:
    """Measure one training step under several rules in turn: seconds, images per second, peak memory.

    bp-checkpoint keeps only the inputs of residual units (or other smallest segments) and recomputes the rest;
    bp-accumulate takes the batch in parts; bll-checkpoint is blocks with checkpointing inside; bll-sum is one backward
    pass of the sum of all local losses. The other rules are those of bll train.

    bll bench --pipeline measures blocks over several processes instead: see bll bench --pipeline --help.
    """

    model: str = "resnet20"
    """mlp, cnn, vit, resnet18/34/50, resnet20/32/56/110, timm:NAME, torchvision:NAME or package.module:function"""
    blocks: str = "4"
    """number of blocks, or several: 2,4,8,16"""
    batch_size: Annotated[int, Range(least=2)] = 128
    """images per step"""
    rules: str = "bp,bp-checkpoint,bp-accumulate,bll,bll-checkpoint,bll-sum"
    """rules to compare with bp"""
    head: str | None = None
    """prediction head at borders, instead of the rule's own: linear, normalised, mlp, conv, residual, pooled,
    patches, depthwise, evidence, unembedding"""
    balance: Literal["time", "memory"] = "memory"
    """cost that the blocks share evenly"""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """precision of the forward pass"""
    compile: Annotated[bool, FlagCreatePairsOff] = False
    """compile each model or block with torch.compile; tensors alive are measured before that"""
    channels_last: Annotated[bool, FlagCreatePairsOff] = False
    """store images and kernels with the channels last in memory"""
    accumulate: Annotated[int, Range(least=1)] = 4
    """parts of the batch for bp-accumulate"""
    steps: Annotated[int, Range(least=1)] = 10
    """measured rounds of one step per rule"""
    warmup: Annotated[int, Range(least=0)] = 2
    """rounds before them that are not measured"""
    scale: Annotated[bool, FlagCreatePairsOff] = False
    """instead: how time and memory of bp and bll grow with the batch and with depth"""
    operations: Annotated[bool, FlagCreatePairsOff, Needs("scale", (False,))] = False
    """also list the ten operations (on a GPU: kernels) of bp and bll that take the most time"""
    plot: Annotated[str | None, Needs("scale", (False,))] = None
    """file (.png or .svg) for a picture of memory over one step"""
    json: Annotated[bool, FlagCreatePairsOff] = False
    """print one JSON object as the last line"""
    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda, cuda:1, ..."""
    threads: Annotated[int, Range(least=0, most=THREADS)] = 0
    """CPU threads; 0 leaves the choice to PyTorch"""
    channels: Annotated[int, Range(least=1, most=2**14)] = 3
    """colour channels of the images, which are noise"""
    size: Annotated[int, Range(least=1, most=2**14)] = 32
    """height and width of the images in pixels"""
    classes: Annotated[int, Range(least=2, most=2**20)] = 10
    """number of classes"""

    def check(self) -> None:
        """Check the options. UserError: a number out of range, an unknown rule, another kind of picture."""
        ranges.check(self)
        for k in self.ks:
            Range(least=1).check("--blocks", k)
        for rule in self.rules.split(","):
            try:
                find(rule)
            except UserError as error:
                raise UserError(f"--rules {self.rules}: {error}") from error
        if "bp-accumulate" in self.rules.split(",") and self.batch_size % self.accumulate:
            raise UserError(f"--accumulate {self.accumulate} does not divide the batch of {self.batch_size} images")
        if self.plot is not None and not self.plot.endswith((".png", ".svg")):
            raise UserError(f"--plot {self.plot!r}: a picture must be .svg or .png")

    @property
    def ks(self) -> list[int]:
        """The numbers of blocks."""
        if not re.fullmatch(r"-?\d{1,18}(,-?\d{1,18})*", self.blocks, re.ASCII):
            raise UserError(f"--blocks {self.blocks!r}: write a number, or several such as 2,4,8")
        return [int(k) for k in self.blocks.split(",")]

    def workload(self, model: nn.Module, *, batch_size: int, device: torch.device) -> Workload:
        """The model on the device, in the memory format of the options, and a batch of noise for it."""
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(batch_size, self.channels, self.size, self.size, generator=generator).to(device)
        y = torch.randint(self.classes, (batch_size,), generator=generator).to(device)
        model = model.to(device)
        if self.channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
            model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        work = Workload(
            model,
            x,
            y,
            classes=self.classes,
            dtype=DTYPES[self.dtype],
            balance=self.balance,
            head=self.head,
            accumulate=self.accumulate,
            name=self.model,
        )
        shape = (len(x[:FEW]), self.classes)
        try_model(model, x[:FEW], name=self.model, shape=shape, context=work.autocast())
        return work
