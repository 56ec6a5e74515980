"""Where borders can stand in a model's own forward pass, and which of these places balance the blocks."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from blocklocal.arguments import require_choice, require_whole
from blocklocal.balance import FREE, Cost, Profile, border_cost, partition
from blocklocal.border import Border
from blocklocal.hooked.autograd_graph import Node, parameters, reachable
from blocklocal.hooked.probe import Output, one_pass, probe, run
from blocklocal.hooked.values import Inputs, call, features, map_tensors, tensors
from blocklocal.layout import Layout
from blocklocal.memory import MemoryTracker
from blocklocal.recompute import NORMS
from blocklocal.split import starts

Build = Callable[[Tensor, Tensor, Layout | None], Border]
FEW = (*NORMS, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
"""The layers after which a border would rather stand than before them."""


def places(model: nn.Module, example: Inputs, *, output: Output) -> list[str]:
    """The submodules after which a border can stand, in the order of the forward pass of `example`.

    Their outputs are all that what follows computes from, as far as parameters are before them: nothing with a gradient
    bypasses them. Of places with nothing but normalisation and activation between them the last counts.
    """
    calls: dict[str, int] = {}
    seen: dict[Node, list[str]] = {}
    names = [name for name, _ in model.named_modules() if name]

    def after(name: str, returned: object) -> object:
        calls[name] = calls.get(name, 0) + 1
        found = features(returned)
        if found is not None and found[0].grad_fn is not None and found[0].dim() > 1:
            seen.setdefault(found[0].grad_fn, []).append(name)
        return returned

    with one_pass(model, example):
        prediction = run(model, example, names=names, at_border=after, output=output)
    known = {parameter: name for name, parameter in model.named_parameters()}
    norms = {
        f"{place}.{name}".removeprefix(".")
        for place, module in model.named_modules()
        if isinstance(module, FEW)
        for name, _ in module.named_parameters(recurse=False)
    }
    found: list[tuple[str, set[str]]] = []
    for node, here in seen.items():
        once = [name for name in here if calls[name] == 1]
        before = reachable(node)
        if not once or not before.isdisjoint(reachable(prediction.grad_fn, but={node})):
            continue
        found.append((min(once, key=len), set(parameters(before, names=known))))
    everything = set(parameters(reachable(prediction.grad_fn), names=known))
    following = [own for _, own in found[1:]] + [everything]
    return [name for (name, own), then in zip(found, following, strict=True) if own and then - own - norms]


def balanced(
    model: nn.Module,
    blocks: int | None,
    example: Inputs,
    *,
    output: Output,
    balance: Literal["time", "memory"],
    build: Build,
    layout: Layout | None,
) -> list[str]:
    """The places that make this number of blocks as even as can be, measured on a copy of the model.

    ValueError: more blocks than there are places, or none asked for.
    """
    if blocks is None:
        raise ValueError(f"where to cut {type(model).__name__}? Pass at=[submodules] or blocks=K")
    blocks = require_whole(blocks, name="blocks", least=1)
    require_choice(balance, ("time", "memory"), name="balance")
    if blocks == 1:
        return []
    found = places(model, example, output=output)
    if blocks > len(found) + 1:
        raise ValueError(
            f"blocks={blocks}: in the forward pass of {type(model).__name__} a border can stand after {len(found)} "
            f"submodules ({', '.join(found[:6])}{', ...' * (len(found) > 6)}), so {len(found) + 1} blocks at most: "
            "nothing with a gradient may bypass a border"
        )
    profile = measure(model, found, example, output=output, build=build, layout=layout)
    return [found[start - 1] for start in starts(profile, blocks=blocks, balance=balance)]


@dataclass
class Segment:
    """What a pass has seen of the computation between two places."""

    seconds: float
    peak: float = 0
    kept: int = 0
    output: int = 0


def measure(
    model: nn.Module,
    names: Sequence[str],
    example: Inputs,
    *,
    output: Output,
    build: Build,
    layout: Layout | None,
    repetitions: int = 3,
) -> Profile:
    """The costs of what is between these places, and of a border at each: forward and backward passes of `example`."""
    seen = probe(model, names, example, output=output, size=_size(model, example, output))
    model = copy.deepcopy(model)
    devices = list({tensor.device for tensor in tensors(example) if tensor.is_cuda})
    with torch.random.fork_rng(devices=devices):
        runs = [_segments(model, names, example, output=output, track=False) for _ in range(repetitions)]
        tracked = _segments(model, names, example, output=output, track=True)
        costs = [
            Cost(min(run[k].seconds for run in runs), peak=one.peak, kept=one.kept, output=one.output)
            for k, one in enumerate(tracked)
        ]
        kinds = [(h.shape, found) for h, found in zip(seen.outputs[:-1], seen.layouts, strict=True)]
        borders: dict[tuple[torch.Size, Layout | None], Cost] = {}
        for h, kind in zip(seen.outputs[:-1], kinds, strict=True):
            if kind not in borders:
                borders[kind] = border_cost(
                    lambda h, prediction, found: _trial(build(h, prediction, layout or found), prediction),
                    h,
                    prediction=seen.outputs[-1],
                    layout=kind[1],
                    repetitions=repetitions,
                )
    return Profile(tuple(costs), (*(borders[kind] for kind in kinds), FREE))
