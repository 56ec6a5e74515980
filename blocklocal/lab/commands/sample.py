"""`bll sample`: text from a trained language model, of any of its exits."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
from torch import Tensor
from tyro.conf import Positional, arg

from blocklocal.graph import mode
from blocklocal.lab.arguments import parse
from blocklocal.lab.commands.eval import find_exit
from blocklocal.lab.errors import UserError
from blocklocal.lab.ranges import Range
from blocklocal.lab.runs.folder import Run
from blocklocal.lab.tasks.text import LanguageModelling
from blocklocal.lab.training.trained import load_trained


@dataclass(frozen=True)
class Options:
    """Continue a text, token by token, with a model that `bll train text:FILE` has trained."""

    run: Annotated[Positional[Path], arg(metavar="RUN")]
    """folder of the run"""
    prompt: str = "\n"
    """the beginning of the text"""
    tokens: Annotated[int, Range(least=1)] = 500
    """number of tokens to add"""
    exit: str = "last"
    """last, all (the exits combined), or the number of a block"""
    temperature: Annotated[float, Range(least=0, most=100)] = 0.8
    """1 samples from the model's distribution, less from a narrower one; 0 takes the most probable token"""
    top: Annotated[int, Range(least=0)] = 0
    """sample from this number of most probable tokens; 0: from all"""
    seed: Annotated[int, Range(least=0, most=2**63 - 1)] = 0
    """seed of the sample"""
    data: str | None = None
    """another location of the same text"""
    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda, ..."""
    trust: bool = False
    """run the code of the model package.module:function that the run names"""


def main(args: Sequence[str]) -> None:
    options = parse(Options, args, prog="bll sample")
    chosen_exit(options.exit)
    run = Run(options.run)
    if run.settings().kind != "text":
        raise UserError(f"the run in {str(run.path)!r} learns from {run.settings().data!r}: only a text can be sampled")
    exit = chosen_exit(options.exit, blocks=run.facts()["blocks"])
    trained = load_trained(run, data=options.data, device=options.device, trust=options.trust)
    experiment, learner, task = trained.experiment, trained.learner, trained.experiment.task
    assert isinstance(task, LanguageModelling)
    experiment.validate()
    ids = torch.tensor([task.vocabulary.encode(options.prompt)], device=experiment.device)

    def predict(window: Tensor) -> Tensor:
        with experiment.autocast():
            return learner.predict(window, exit=exit)[0, -1].float()

    sys.stdout.write(options.prompt)
    drawn = tokens(
        predict,
        ids,
        context=experiment.settings.context,
        temperature=options.temperature,
        top=options.top,
        seed=options.seed,
    )
    written: list[int] = []
    shown = ""
    with mode(learner, training=False):
        for _, token in zip(range(options.tokens), drawn, strict=False):
            written.append(token)
            text = task.vocabulary.decode(written)
            if not text.endswith("\ufffd"):  # a character of several bytes, of which some are still to come
                sys.stdout.write(text[len(shown) :])
                sys.stdout.flush()
                shown = text
    sys.stdout.write("\n")


def chosen_exit(exit: str, *, blocks: int | None = None) -> int | Literal["all"] | None:
    """What `--exit` names, as `BlockLocal.predict` takes it. UserError: no exit, or one of more than these blocks."""
    if exit == "all":
        return "all"
    found = find_exit(exit, blocks=blocks)
    if isinstance(found, float):
        raise UserError(f"--exit {exit}: choose last, all, or a block")
    return found


def tokens(
    predict: Callable[[Tensor], Tensor], ids: Tensor, *, context: int, temperature: float, top: int, seed: int
) -> Iterator[int]:
    """Draw one token after another. predict: from ids (1, T), T at most `context`, to logits (n,) of the next one."""
    draws = torch.Generator().manual_seed(seed)
    while True:
        logits = predict(ids[:, -context:]).cpu()
        if top and top < len(logits):
            logits[logits < logits.topk(top).values[-1]] = -torch.inf
        if temperature:
            token = torch.multinomial((logits / temperature).softmax(-1), 1, generator=draws)
        else:
            token = logits.argmax(keepdim=True)
        ids = torch.cat([ids, token[None].to(ids.device)], 1)
        yield int(token)
