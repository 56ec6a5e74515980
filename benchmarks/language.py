"""A small GPT on the characters of a text, by backpropagation or in blocks: nats per character on its last tenth.

The recipe is nanoGPT's for a CPU: AdamW, rate 1e-3 with 100 steps of warm-up and a cosine to a tenth of it, betas 0.9
and 0.99, weight decay 0.1 on matrices, gradients clipped to length 1 (those of a block by themselves), no dropout. One
line of JSON is appended to --out; a setting that is there is passed over.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import blocklocal as bll
from blocklocal.lab.models.gpt import GPT
from blocklocal.operations import operations


def windows(text: Tensor, *, context: int) -> tuple[Tensor, Tensor]:
    """All windows of a text one behind the other, and the tokens that follow theirs."""
    count = (len(text) - 1) // context
    return text[: count * context].view(count, context), text[1 : count * context + 1].view(count, context)


def optimizer(parameters: list[nn.Parameter]) -> torch.optim.AdamW:
    matrices = [p for p in parameters if p.dim() > 1]
    others = [p for p in parameters if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.99))


def rate(step: int, *, steps: int) -> float:
    if step < 100:
        return 1e-3 * (step + 1) / 101
    return 1e-4 + 0.45e-3 * (1 + math.cos(math.pi * (step - 100) / (steps - 100)))


@torch.no_grad()
def evaluate(predict, x: Tensor, y: Tensor) -> list[float]:
    """Nats per character of each of the predictions of predict(x)."""
    totals: Tensor | None = None
    for rows in torch.arange(len(x)).split(128):
        losses = [F.cross_entropy(p.flatten(0, 1), y[rows].flatten(), reduction="sum") for p in predict(x[rows])]
        totals = torch.stack(losses) + (0 if totals is None else totals)
    assert totals is not None
    return (totals / y.numel()).tolist()


def train(options: argparse.Namespace) -> dict:
    text = options.text.read_text(encoding="utf-8")
    letters = sorted(set(text))
    ids = torch.tensor([letters.index(letter) for letter in text])
    begin = int(0.9 * len(ids))
    aside = begin - 256 * options.context  # what weighs the exits is not trained on
    training, held_out = ids[:aside], windows(ids[begin:], context=options.context)
    torch.manual_seed(options.seed)
    model = GPT(
        tokens=len(letters), context=options.context, width=options.width, depth=options.depth, heads=options.heads
    )
    example = held_out[0][: options.batch_size]
    loss = options.variational * bll.Variational() + bll.Predictive() if options.variational else bll.Predictive()
    learner = bll.Hooked(
        model,
        at=[f"blocks.{options.depth * k // options.blocks - 1}" for k in range(1, options.blocks)],
        classes=len(letters),
        example=example,
        loss=loss,
    )
    parameters = [learner.block_parameters(k) for k in range(options.blocks)]
    optimizers = [optimizer(own) for own in parameters]
    draws = torch.Generator().manual_seed(options.seed)
    begun = time.process_time()
    for step in range(options.steps):
        first = torch.randint(len(training) - options.context - 1, (options.batch_size, 1), generator=draws)
        places = first + torch.arange(options.context)
        learner.backward(training[places], training[places + 1])
        for own, one in zip(parameters, optimizers, strict=True):
            nn.utils.clip_grad_norm_(own, 1.0)
            for group in one.param_groups:
                group["lr"] = rate(step, steps=options.steps)
            one.step()
            one.zero_grad()
        if (step + 1) % 500 == 0:
            print(f"step {step + 1}", flush=True)
    seconds = time.process_time() - begun
    learner.eval()
    learner.fit_exits([windows(ids[aside:begin], context=options.context)])
    exits = evaluate(learner.exits, *held_out)
    (combined,) = evaluate(lambda x: [learner.predict(x, exit="all")], *held_out)
    whole = operations(model, example)
    heads = sum(
        operations(lambda h, border=border: border.predict(border.message(h)), torch.zeros(2, *border.spec.shape))
        for border in learner.borders
    )
    return {
        "exits": exits,
        "combined": combined,
        "operations": 1 + heads / whole,
        "processor_seconds": seconds,
        "torch": torch.__version__,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path, help="a file of text")
    parser.add_argument("--blocks", type=int, default=1, help="1 is backpropagation")
    parser.add_argument("--variational", type=float, default=0.1, help="weight of the variational term")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch-size", type=int, default=12)
    parser.add_argument("--context", type=int, default=64)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/language.jsonl"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    settings = {name: value for name, value in vars(options).items() if name not in ("text", "out")}
    lines = options.out.read_text().splitlines() if options.out.exists() else []
    if any(all(json.loads(line)[name] == value for name, value in settings.items()) for line in lines):
        return
    found = {**settings, **train(options)}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with options.out.open("a") as file:
        file.write(json.dumps(found) + "\n")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
