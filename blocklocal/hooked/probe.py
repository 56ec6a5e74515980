"""What one pass of a batch through a model shows of the borders in it, and what passes beside them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from blocklocal.arguments import describe, first_line
from blocklocal.graph import mode
from blocklocal.hooked.autograd_graph import parameters, reachable, shared
from blocklocal.hooked.reads import Reads
from blocklocal.hooked.values import Inputs, call, features, map_tensors, tensors
from blocklocal.internals import version_of
from blocklocal.layout import Layout, Readings, find_layouts
from blocklocal.shape_probe import check_prediction, drops_in_place

Output = Callable[[Any], Tensor]


@dataclass(frozen=True)
class Probe:
    """names: of the submodules with a border, in the order of the forward pass. outputs: the features there, and the
    prediction. layouts: as found at each border. parameters: the names of each block's own. tied: those that several
    blocks read. writes_input: whether the model writes into the features at a border after it."""

    names: list[str]
    outputs: list[Tensor]
    layouts: list[Layout | None]
    parameters: list[list[str]]
    tied: list[str]
    reads: list[set[str]]
    writes_input: list[bool]


def probe(
    model: nn.Module,
    names: Sequence[str],
    example: Inputs,
    *,
    output: Output,
    size: int | None = None,
    tied: bool = False,
) -> Probe:
    """What `model` does on `example` in evaluation mode, with a border after each of the submodules.

    ValueError: a submodule that is not there, is not called exactly once or returns no features; a value that passes a
    border beside them; unless `tied`, a parameter that two blocks read; a prediction of another size.
    """
    check_names(model, names)
    order, outputs, handed_on, versions = [], [], [], []
    with one_pass(model, example), Readings(next(tensors(example))) as readings, Reads(model) as reads:

        def at_border(name: str, returned: object) -> object:
            found = features(returned)
            if found is None:
                raise ValueError(
                    f"at={name!r}: it returns {describe(returned)}, but a border needs a tensor of features"
                )
            h, rebuild = found
            order.append(name)
            outputs.append(h)
            handed_on.append(h.detach())
            versions.append(version_of(h))
            readings.begin(handed_on[-1])
            reads.begin()
            return rebuild(handed_on[-1])

        prediction = run(model, example, names=names, at_border=at_border, output=output)
    for name in names:
        if order.count(name) != 1:
            raise ValueError(
                f"at={name!r}: a border needs a submodule called once, this one is called {order.count(name)} times"
            )
    if size is not None:
        check_prediction(prediction, size=size)
    if order and prediction.grad_fn is None and any(p.requires_grad for p in model.parameters()):
        raise ValueError(f"at={order[-1]!r}: no computation with parameters follows, so no block would stand after it")
    found, several = _owners(model, order, [*outputs, prediction], tied=tied)
    values = [h.detach() for h in (*outputs, prediction)]
    _check_batch(model, example, values, names=order, output=output)
    drops = drops_in_place(model)
    writes = [drops or version_of(h) != version for h, version in zip(handed_on, versions, strict=True)]
    return Probe(order, values, find_layouts(values[:-1], readings.all), found, several, reads.all, writes)


def check_names(model: nn.Module, names: Sequence[str]) -> None:
    modules = dict(model.named_modules())
    for i, name in enumerate(names):
        if name not in modules or not name:
            near = [known for known in modules if known.count(".") <= 1 and known]
            raise ValueError(
                f"at={name!r}: {type(model).__name__} has no such submodule; it has "
                f"{', '.join(map(repr, near[:12]))}{', ...' * (len(near) > 12)}"
            )
        if name in names[:i]:
            raise ValueError(f"at={name!r} is there twice: one border stands after a submodule")


@contextmanager
def one_pass(model: nn.Module, example: Inputs) -> Iterator[None]:
    """Evaluation mode with gradients; afterwards modes and random state as before."""
    devices = list({t.device for t in tensors(example) if t.is_cuda})
    flags = [(module, module.training) for module in model.modules()]
    try:
        with mode(model, training=False), torch.random.fork_rng(devices=devices), torch.enable_grad():
            yield
    finally:
        for module, training in flags:
            module.train(training)  # which also clears what some models cache in evaluation mode, as LeViT


def run(
    model: nn.Module,
    example: Inputs,
    *,
    names: Sequence[str],
    at_border: Callable[[str, object], object],
    output: Output,
) -> Tensor:
    """The prediction of one forward pass in which at_border(name, returned) replaces what each submodule returns."""

    def hook(name: str) -> Callable[..., object]:
        return lambda module, arguments, returned: at_border(name, returned)

    handles = [model.get_submodule(name).register_forward_hook(hook(name)) for name in names]
    try:
        returned = call(model, map_tensors(Tensor.clone, example))
    except (RuntimeError, IndexError, TypeError, AttributeError) as error:
        raise ValueError(f"example does not go through the model ({first_line(error)})") from error
    finally:
        for handle in handles:
            handle.remove()
    return output(returned)


def _owners(
    model: nn.Module, order: Sequence[str], outputs: Sequence[Tensor], *, tied: bool
) -> tuple[list[list[str]], list[str]]:
    """The names of each block's parameters, and of those that are tied."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    earlier: set[Any] = set()
    found: list[list[str]] = []
    several: list[str] = []
    for k, h in enumerate(outputs):
        for node in shared(h, earlier):
            variable = getattr(node, "variable", None)
            if (name := names.get(variable) if variable is not None else None) is None:
                beneath = parameters(reachable(node), names=names)
                depends = f", which depends on parameter {beneath[0]!r}" if beneath else ""
                raise ValueError(
                    f"at={order[k - 1]!r}: a value{depends}, passes the border beside the features of that submodule: "
                    "put the border where the features alone go on, or let the model detach the value"
                )
            several.append(name)
        nodes = reachable(h.grad_fn)
        found.append(parameters(nodes, names=names))
        earlier |= nodes
    if several and not tied:
        blocks = [k for k, own in enumerate(found) if several[0] in own]
        raise ValueError(
            f"parameter {several[0]!r} is read by block {blocks[0]} and by block {blocks[1]}: untie it (transformers: "
            "tie_word_embeddings=False), cut so that one block reads it, or pass tied=True to let both losses move it"
        )
    return _complete(list(names.values()), found), list(dict.fromkeys(several))


def _complete(names: Sequence[str], found: list[list[str]]) -> list[list[str]]:
    """The same with the parameters that the example did not reach, frozen ones or experts that had no token: each goes
    to the block of the parameters nearest to it in the model."""
    owner = {name: k for k, own in enumerate(found) for name in own}
    blocks = [list(own) for own in found]
    for name in names:
        if name not in owner:
            block = nearest(name, owner)
            blocks[-1 if block is None else block].append(name)
    return blocks


def nearest(name: str, owner: Mapping[str, int]) -> int | None:
    """The block that owns the parameters nearest to a parameter or buffer in the model; None where several do."""
    place = name
    while place:
        place = place.rpartition(".")[0]
        near = {k for other, k in owner.items() if other.startswith(f"{place}.")}
        if len(near) == 1:
            return near.pop()
    return None


def _check_batch(
    model: nn.Module, example: Inputs, outputs: list[Tensor], *, names: Sequence[str], output: Output
) -> None:
    """ValueError: features whose first dimension is not the batch. A batch of one more sample tells them apart."""
    _require_batch_first(names, outputs)
    batch = len(outputs[-1])
    if not any(h.dim() > 2 and h.shape[1] == batch for h in outputs[:-1]):
        return
    seen: list[Tensor] = []

    def at_border(name: str, returned: object) -> object:
        found = features(returned)
        assert found is not None
        seen.append(found[0])
        return returned

    with one_pass(model, example), torch.no_grad():
        longer = one_more(example, batch=batch)
        seen.append(run(model, longer, names=names, at_border=at_border, output=output))
    _require_batch_first(names, seen)


def one_more(example: Inputs, *, batch: int) -> Inputs:
    """The example with its first sample at the end once more."""
    return map_tensors(lambda t: torch.cat([t, t[:1]]) if t.dim() and len(t) == batch else t, example)


def _require_batch_first(names: Sequence[str], outputs: Sequence[Tensor]) -> None:
    for name, h in zip(names, outputs, strict=False):
        if len(h) != len(outputs[-1]):
            raise ValueError(
                f"at={name!r}: it returns features of shape {tuple(h.shape)}, and the prediction has shape "
                f"{tuple(outputs[-1].shape)}: the first dimension of features must be the batch; cut elsewhere, or put "
                "the batch first"
            )
