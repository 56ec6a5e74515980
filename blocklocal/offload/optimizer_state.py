"""The state of an optimizer: its tensors by name, and the rest of it as it is saved."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from blocklocal.offload.part import stand_in
from blocklocal.offload.saved import outline, shapes


def optimizer_tensors(optimizer: Optimizer | None, names: Mapping[int, str]) -> dict[str, Tensor]:
    """The tensors of an optimizer's state, as optimizer.KEY.PARAMETER. names: of parameters, by id."""
    return {name: value for name, value in _values(optimizer, names) if isinstance(value, Tensor)}


def optimizer_state(optimizer: Optimizer | None, names: Mapping[int, str], outlines: Mapping[str, Tensor]) -> Any:
    """What `load_optimizer` needs. outlines: of the tensors that are in the store."""
    if optimizer is None:
        return None
    tensors = optimizer_tensors(optimizer, names)
    return {
        "kind": type(optimizer).__name__,
        "groups": [
            {**{key: value for key, value in group.items() if key != "params"}, "parameters": len(group["params"])}
            for group in optimizer.param_groups
        ],
        "values": {name: value for name, value in _values(optimizer, names) if not isinstance(value, Tensor)},
        "staying": {name: (t.cpu(), t.is_cpu) for name, t in tensors.items() if name not in outlines},
        "elsewhere": shapes(outlines),
    }


def load_optimizer(
    optimizer: Optimizer | None, state: Any, names: Mapping[int, str], *, device: torch.device
) -> dict[str, Tensor]:
    """Make the optimizer what it was, with stand-ins for what is in the store; returns their outlines.

    ValueError: it is another optimizer, or has other groups of parameters.
    """
    if optimizer is None and state is None:
        return {}
    groups = [] if optimizer is None else [len(group["params"]) for group in optimizer.param_groups]
    kind = "none" if optimizer is None else type(optimizer).__name__
    if state is None or (kind, groups) != (state["kind"], [group["parameters"] for group in state["groups"]]):
        before = (
            "none"
            if state is None
            else f"{state['kind']} with other groups"
            if kind == state["kind"]
            else state["kind"]
        )
        raise ValueError(f"the optimizer of a block was {before} and is {kind}: pass the optimizer= of the saved run")
    assert optimizer is not None
    for group, saved in zip(optimizer.param_groups, state["groups"], strict=True):
        group.update({key: value for key, value in saved.items() if key != "parameters"})
    outlines = {name: outline(shape) for name, shape in state["elsewhere"].items()}
    owners = {names[id(p)]: p for group in optimizer.param_groups for p in group["params"] if id(p) in names}
    optimizer.state.clear()
    kept = {name: value if on_cpu else value.to(device) for name, (value, on_cpu) in state["staying"].items()}
    there = {name: stand_in(o, device=device) for name, o in outlines.items()}
    for name, value in (state["values"] | kept | there).items():
        _, key, owner = name.split(".", 2)
        optimizer.state[owners[owner]][key] = value
    return outlines


def _values(optimizer: Optimizer | None, names: Mapping[int, str]) -> Iterator[tuple[str, Any]]:
    parameters: list[nn.Parameter] = (
        [] if optimizer is None else [p for g in optimizer.param_groups for p in g["params"]]
    )
    for parameter in parameters:
        if optimizer is not None and id(parameter) in names:
            for key, value in optimizer.state.get(parameter, {}).items():
                yield f"optimizer.{key}.{names[id(parameter)]}", value
