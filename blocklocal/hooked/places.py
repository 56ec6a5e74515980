"""Where borders can stand in a model's own forward pass, and which of these places balance the blocks."""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn

from blocklocal.arguments import require_choice, require_whole
from blocklocal.autograd_graph import Node, parameters, reachable
from blocklocal.balance import FREE, BorderLoss, Cost, Profile, border_cost, starts
from blocklocal.hooked.probe import Output, one_pass, probe, run
from blocklocal.layout import Layout
from blocklocal.memory import MemoryTracker
from blocklocal.recompute import NORMS
from blocklocal.values import Inputs, features, one_more, tensors

FEW = (*NORMS, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
"""The layers after which a border would rather stand than before them."""


def places(model: nn.Module, example: Inputs, *, output: Output, tied: bool = False) -> list[str]:
    """The submodules after which a border can stand, in the order of the forward pass of `example`.

    Their features are all that what follows computes from, as far as parameters are before them: nothing with a
    gradient bypasses them, not even a value that the submodule returns beside them, but for parameters where `tied`.
    Their first dimension is the batch. Of places with nothing but normalisation and activation between them the last
    counts.
    """
    calls: dict[str, int] = {}
    source: dict[Node, Node] = {}
    seen: dict[Node, list[tuple[str, Node]]] = {}
    names = [name for name, _ in model.named_modules() if name]

    def after(name: str, returned: object) -> object:
        calls[name] = calls.get(name, 0) + 1
        found = features(returned)
        if found is None or (h := found[0]).grad_fn is None or h.dim() < 2:
            return returned
        marked = h.clone()  # a node for each submodule, also for those that return their input, which others may read
        source[marked.grad_fn] = source.get(h.grad_fn, h.grad_fn)
        seen.setdefault(source[marked.grad_fn], []).append((name, marked.grad_fn))
        return found[1](marked)

    with one_pass(model, example):
        prediction = run(model, example, names=names, at_border=after, output=output)
    batched = _batched(model, names, example, output=output, batch=len(prediction))
    known = {parameter: name for name, parameter in model.named_parameters()}
    norms = {
        f"{place}.{name}".removeprefix(".")
        for place, module in model.named_modules()
        if isinstance(module, FEW)
        for name, _ in module.named_parameters(recurse=False)
    }
    found: list[tuple[str, set[str]]] = []
    for here in seen.values():
        for name, node in sorted(here, key=lambda one: len(one[0])):
            before = reachable(node)
            bypassing = before & reachable(prediction.grad_fn, but={node})
            free = not bypassing or (tied and all(hasattr(one, "variable") for one in bypassing))
            if calls[name] == 1 and name in batched and free:
                found.append((name, set(parameters(before, names=known))))
                break
    everything = set(parameters(reachable(prediction.grad_fn), names=known))
    following = [own for _, own in found[1:]] + [everything]
    return [name for (name, own), then in zip(found, following, strict=True) if own and then - own - norms]


def _batched(model: nn.Module, names: Sequence[str], example: Inputs, *, output: Output, batch: int) -> set[str]:
    """Those whose features have the batch first: as many as there are predictions, and as many with one sample more.

    Where the samples differ in their predictions, they must differ in the features, unlike position embeddings.
    """

    def of(x: Inputs) -> set[str]:
        seen: dict[str, tuple[int, bool]] = {}

        def after(name: str, returned: object) -> object:
            found = features(returned)
            if found is not None and found[0].dim() > 1:
                seen[name] = len(found[0]), _same(found[0])
            return returned

        prediction = run(model, x, names=names, at_border=after, output=output)
        constant = _same(prediction)
        return {name for name, (size, same) in seen.items() if size == len(prediction) and (constant or not same)}

    with one_pass(model, example), torch.no_grad():
        found = of(example)
        with suppress(ValueError):  # where an input beside the batch happens to be as long
            found &= of(one_more(example, batch=batch))
    return found


def _same(h: Tensor) -> bool:
    """Whether all samples are the same."""
    return torch.equal(h, h[:1].expand_as(h))


def balanced(
    model: nn.Module,
    blocks: int | None,
    example: Inputs,
    *,
    output: Output,
    balance: Literal["time", "memory"],
    border: BorderLoss,
    tied: bool,
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
    found = places(model, example, output=output, tied=tied)
    if blocks > len(found) + 1:
        raise ValueError(
            f"blocks={blocks}: {type(model).__name__} can be cut at {len(found)} places only"
            f"{': ' * bool(found)}{', '.join(found[:6])}{', ...' * (len(found) > 6)}; nothing with a gradient may "
            f"bypass a border{'' if tied else ', and no tied parameter unless you pass tied=True'}"
        )
    profile = measure(model, found, example, output=output, border=border, tied=tied)
    return [found[start - 1] for start in starts(profile, blocks=blocks, balance=balance)]


def measure(
    model: nn.Module,
    names: Sequence[str],
    example: Inputs,
    *,
    output: Output,
    border: BorderLoss,
    tied: bool,
    repetitions: int = 3,
) -> Profile:
    """The costs of what is between these places, and of a border at each: forward and backward passes of `example`."""
    seen = probe(model, names, example, output=output, tied=tied)
    model = copy.deepcopy(model)
    devices = list({tensor.device for tensor in tensors(example) if tensor.is_cuda})
    with torch.random.fork_rng(devices=devices):
        passes = [_segments(model, names, example, output=output) for _ in range(repetitions)]
        costs = [replace(same[0], seconds=min(one.seconds for one in same)) for same in zip(*passes, strict=True)]
        kinds: list[tuple[torch.Size, Layout | None]] = [
            (h.shape, layout) for h, layout in zip(seen.outputs, seen.layouts, strict=False)
        ]
        borders: dict[tuple[torch.Size, Layout | None], Cost] = {}
        for h, kind in zip(seen.outputs, kinds, strict=False):
            if kind not in borders:
                borders[kind] = border_cost(
                    border, h, prediction=seen.outputs[-1], layout=kind[1], repetitions=repetitions
                )
    return Profile(tuple(costs), (*(borders[kind] for kind in kinds), FREE))


def _segments(model: nn.Module, names: Sequence[str], example: Inputs, *, output: Output) -> list[Cost]:
    """Each segment's costs, in one pass that ends and begins at every place. Parameters get gradients, which go."""
    found: list[Cost] = []
    tracker, start = MemoryTracker(), 0.0

    def begin() -> None:
        nonlocal tracker, start
        tracker = MemoryTracker()
        _synchronize(example)
        start = time.perf_counter()
        tracker.__enter__()

    def end(h: Tensor) -> None:
        kept = tracker.alive
        if h.requires_grad:
            total = (1.0 * h).sum()  # so that the gradient which comes in takes memory, and is let go when read
            total.backward()
        _synchronize(example)
        tracker.__exit__(None, None, None)
        gradients = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
        seconds, peak = time.perf_counter() - start, tracker.timeline.peak
        found.append(Cost(seconds, peak=peak, kept=kept, output=h.nbytes, gradients=gradients))
        model.zero_grad(set_to_none=True)

    def at_border(name: str, returned: object) -> object:
        taken = features(returned)
        assert taken is not None
        h, rebuild = taken
        end(h)
        handed_on = h.detach().requires_grad_().clone()  # a segment may write into its input
        begin()
        return rebuild(handed_on)

    try:
        begin()
        end(run(model, example, names=names, at_border=at_border, output=output))
    finally:
        if len(found) <= len(names):  # it failed on the way
            tracker.__exit__(None, None, None)
    return found


def _synchronize(example: Inputs) -> None:
    if (tensor := next(tensors(example))).is_cuda:
        torch.cuda.synchronize(tensor.device)
