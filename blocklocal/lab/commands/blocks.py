"""`bll blocks`: where a model is cut, and what each block costs to train."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor
from tyro.conf import Positional, arg

from blocklocal import BlockLocal
from blocklocal.lab import models
from blocklocal.lab.arguments import parse
from blocklocal.lab.bench.block_costs import submodules, table
from blocklocal.lab.errors import blame
from blocklocal.lab.ranges import Needs, Range
from blocklocal.lab.terminal import Terminal
from blocklocal.lab.training import rules
from blocklocal.lab.training.trial import FEW, try_learning, try_model


@dataclass(frozen=True)
class Options:
    """Show the blocks of a model: their submodules, parameters, activation memory and time."""

    model: Annotated[Positional[str], arg(metavar="MODEL")]
    """mlp, cnn, vgg8, vit, resnet8/18/20/32/34/50/56/110, timm:NAME, torchvision:NAME, hf:CONFIG (transformers: a
    folder, a JSON file or a kind such as vit) or package.module:function"""
    model_args: tuple[str, ...] = ()
    """more arguments of the function that makes the model, or fields of CONFIG: NAME=VALUE, such as img_size=32"""
    blocks: Annotated[int, Range(least=1), Needs("at", ((),))] = 4
    """number of blocks"""
    at: tuple[str, ...] = ()
    """submodules to cut after, instead of --blocks"""
    rule: str = "bll"
    """learning rule of the blocks, which decides what is at the borders"""
    head: str | None = None
    """prediction head at borders, instead of the rule's own: as for bll train"""
    budget: Annotated[float | None, Range(above=0), Needs("head", (None,))] = None
    """use the best head within this share of its block's operations, instead of the rule's own: 0.1"""
    channels: Annotated[int, Range(least=1, most=2**14)] = 3
    """colour channels of the images"""
    size: Annotated[int, Range(least=1, most=2**14)] = 32
    """height and width of the images in pixels"""
    classes: Annotated[int, Range(least=2, most=2**20)] = 10
    """number of classes"""
    batch_size: Annotated[int, Range(least=2)] = 32
    """images in the measured batch"""
    plan: Annotated[int, Range(least=0)] = 0
    """instead: place the blocks on this number of ranks, and predict the time of pipelines of up to that many"""
    speeds: Annotated[tuple[float, ...], Range(above=0), Needs("plan")] = ()
    """with --plan: speed of each rank relative to this process (default: 1 for all)"""
    link: Annotated[str, Needs("plan")] = ""
    """with --plan: link between ranks, such as 100mbit or 100mbit,0.5ms (latency); without it messages take no time"""
    message_dtype: Annotated[Literal["fp32", "bf16"], Needs("plan")] = "fp32"
    """with --plan: precision of the messages between blocks"""


def main(args: Sequence[str]) -> None:
    options = parse(Options, args, prog="bll blocks")
    if options.plan:
        from blocklocal.lab.pipeline_bench import plan  # takes a second to import

        blocks = len(options.at) + 1 if options.at else options.blocks
        plan.check(blocks=blocks, ranks=options.plan, speeds=options.speeds, link=options.link)
    size = (options.size, options.size)
    model = models.build(
        options.model,
        channels=options.channels,
        size=size,
        classes=options.classes,
        arguments=models.read_arguments(options.model_args),
    )
    x = torch.randn(options.batch_size, options.channels, *size)
    shape = (len(x[:FEW]), options.classes)
    try_model(model, x[:FEW], name=options.model, shape=shape, context=nullcontext())
    problem = rules.Problem(
        classes=options.classes,
        example=x,
        blocks=options.blocks,
        at=options.at or models.CUTS.get((options.model, options.blocks)),
        changes=rules.Changes(head=options.head, budget=options.budget),
    )
    y = torch.randint(options.classes, (len(x),))
    with blame(f"model {options.model!r} does not fit rule {options.rule!r}"):
        learning = rules.apply(options.rule, model, problem)
    try_learning(learning, x[:FEW], y[:FEW], name=options.model, context=nullcontext())
    with learning.with_targets(y):
        _show(learning.learner, x, y, options)


def _show(learner: BlockLocal, x: Tensor, y: Tensor, options: Options) -> None:
    if not options.plan:
        Terminal().print(table(learner, x, y))
        return
    from blocklocal.lab.pipeline_bench import plan

    names = [", ".join(submodules(learner.model, block)) for block in learner.blocks]
    plan.show(
        learner,
        x,
        y,
        names=names,
        ranks=options.plan,
        speeds=options.speeds,
        link=options.link,
        message_dtype=options.message_dtype,
    )
