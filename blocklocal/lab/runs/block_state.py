"""The part of a checkpoint for a block: its tensors and its optimizer's, by their names in the learner."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from blocklocal import BlockLocal
from blocklocal.alignment import Alignment
from blocklocal.lab.errors import UserError
from blocklocal.lab.runs.checkpoint_part import State

OPTIMIZER, ALIGNMENT, FEEDBACK = "optimizer.", "alignment.", "feedback."
GROUP = "group."  # what an optimizer counts for all parameters of a group
COUNTERS = ("k", "weight_sum", "lr_max")  # of a schedule-free one
CPU, GPU = "random.cpu", "random.cuda."


def block_state(learner: BlockLocal, k: int, optimizer: Optimizer | None) -> State:
    """Parameters and buffers of block k and its border; of the optimizer `optimizer.KEY.NAME` for each parameter, and
    `group.I.KEY` for each number that it counts itself.

    If replicas hold shares of the block, all of them call this and get the whole. UserError: the state of a module is
    not a tensor.
    """
    state = {**learner.blocks[k].state_dict(prefix=f"blocks.{k}.")}
    if k < len(learner.borders):
        state |= learner.borders[k].state_dict(prefix=f"borders.{k}.")
    for name, kept in state.items():
        if not isinstance(kept, Tensor):
            raise UserError(f"{name} of the model is a {type(kept).__name__}: a checkpoint can only hold tensors")
    for name, parameter in learner.named_parameters():
        if optimizer is not None and _belongs(name, k):
            kept = optimizer.state.get(parameter, {})
            state |= {f"{OPTIMIZER}{key}.{name}": value for key, value in kept.items() if isinstance(value, Tensor)}
    for i, group in enumerate(optimizer.param_groups if optimizer else ()):
        counted = {f"{GROUP}{i}.{key}": group[key] for key in COUNTERS if key in group}
        state |= {name: torch.tensor(value, dtype=torch.float64) for name, value in counted.items()}
    return {name: tensor.full_tensor() if isinstance(tensor, DTensor) else tensor for name, tensor in state.items()}


def load_block_state(learner: BlockLocal, k: int, optimizer: Optimizer | None, state: State) -> None:
    """Restore block k from what `block_state` returned. UserError: the state of another model."""
    parameters, tensors = dict(learner.named_parameters()), _tensors(state)
    weights = {name: tensor for name, tensor in tensors.items() if _belongs(name, k)}
    _check_fit(weights, {name: tensor for name, tensor in learner.state_dict().items() if _belongs(name, k)})
    for kind, modules in (("blocks", learner.blocks), ("borders", learner.borders)):  # the others may be on meta
        own, prefix = modules[k : k + 1], f"{kind}.{k}."
        shares = {
            n.removeprefix(prefix): _share(t, parameters.get(n)) for n, t in weights.items() if n.startswith(prefix)
        }
        own.load_state_dict({f"0.{name}": tensor for name, tensor in shares.items()})
    for name, tensor in tensors.items():
        if optimizer is not None and name.startswith(OPTIMIZER):
            key, _, owner = name.removeprefix(OPTIMIZER).partition(".")
            parameter = parameters.get(owner)
            if parameter is None or tensor.shape not in (parameter.shape, ()):
                raise misfit(f"the optimizer's {name.removeprefix(OPTIMIZER)}")
            optimizer.state[parameter][key] = _share(tensor.to(parameter.device, copy=True), parameter)
    for i, group in enumerate(optimizer.param_groups if optimizer else ()):
        for key in COUNTERS:
            if key in group and f"{GROUP}{i}.{key}" not in tensors:
                raise misfit(f"the optimizer's {key}")
            if key in group:
                group[key] = type(group[key])(tensors[f"{GROUP}{i}.{key}"].item())


def alignment_state(alignment: Alignment) -> State:
    """What the rule needs to continue: `alignment.KEY`, and `alignment.feedback.LAYER` for each layer."""
    kept = alignment.state_dict()
    feedback = {FEEDBACK + name: tensor for name, tensor in kept.pop("feedback").items()}
    return {ALIGNMENT + name: value for name, value in {**kept, **feedback}.items()}


def load_alignment_state(alignment: Alignment, state: State) -> None:
    """Restore the rule from what `alignment_state` returned. UserError: the state of another rule or model, or none."""
    own = {name.removeprefix(ALIGNMENT): value for name, value in state.items() if name.startswith(ALIGNMENT)}
    feedback = {name.removeprefix(FEEDBACK): tensor for name, tensor in _tensors(own).items()}
    others = {name: value for name, value in own.items() if not name.startswith(FEEDBACK)}
    try:
        alignment.load_state_dict({**others, "feedback": feedback})
    except (ValueError, KeyError) as error:
        raise misfit(str(error)) from error


def random_state() -> State:
    """The state of the random number generators of this process."""
    gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {CPU: torch.get_rng_state(), **{f"{GPU}{i}": numbers for i, numbers in enumerate(gpus)}}


def load_random_state(state: State) -> None:
    """Restore the random number generators, which a pipeline does not save. UserError: their state is invalid."""
    tensors, gpus = _tensors(state), torch.cuda.device_count() if torch.cuda.is_available() else 0
    try:
        if CPU in tensors:
            torch.set_rng_state(tensors[CPU])
        for i in range(gpus):
            if f"{GPU}{i}" in tensors:
                torch.cuda.set_rng_state(tensors[f"{GPU}{i}"], i)
    except (RuntimeError, TypeError) as error:
        raise misfit(str(error)) from error


def unshard(learner: BlockLocal) -> None:
    """Replace this process's shares by empty tensors for the whole parameters; their values are lost."""
    learner.convert(
        lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype) if isinstance(tensor, DTensor) else tensor
    )


def _share(tensor: Tensor, parameter: nn.Parameter | None) -> Tensor:
    """This process's share of a whole tensor, if it keeps a share of the parameter."""
    if not isinstance(parameter, DTensor):
        return tensor
    return distribute_tensor(tensor, parameter.device_mesh, parameter.placements, src_data_rank=None)


def _belongs(name: str, k: int) -> bool:
    return name.startswith((f"blocks.{k}.", f"borders.{k}."))


def _tensors(state: State) -> dict[str, Tensor]:
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}


def _check_fit(stored: dict[str, Tensor], own: dict[str, Tensor]) -> None:
    differing = [name for name in stored if name in own and _kind(stored[name]) != _kind(own[name])]
    lists = {"missing": own.keys() - stored, "unknown": stored.keys() - own, "of another shape or type": differing}
    if any(lists.values()):
        raise misfit("; ".join(f"{what}: {_listed(names)}" for what, names in lists.items()))


def _listed(names: Collection[str]) -> str:
    first, rest = sorted(names)[:4], len(names) - 4
    return ", ".join(first) + (f" and {rest} more" if rest > 0 else "") or "none"


def _kind(tensor: Tensor) -> tuple[torch.Size, torch.dtype]:
    return tensor.shape, tensor.dtype


def misfit(what: str) -> UserError:
    """The error for a valid checkpoint that belongs to another model or rule."""
    return UserError(
        "the checkpoint does not fit the model as it is built now: "
        f"restore the code that it was trained with, or start a new run ({what})"
    )
