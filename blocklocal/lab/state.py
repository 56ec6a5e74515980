"""What a checkpoint keeps of a block: its tensors and its optimizer's, by the names that they have in the learner."""

from __future__ import annotations

import io
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from blocklocal import BlockLocal
from blocklocal.lab.checkpoints import Checkpoints, State
from blocklocal.lab.errors import UserError

OPTIMIZER = "optimizer."


def block_state(learner: BlockLocal, k: int, optimizer: Optimizer | None) -> State:
    """Parameters and buffers of block k and its border; of the optimizer `optimizer.KEY.NAME` for each parameter.

    Where replicas hold shares of the block, all of them call it and get the whole.
    """
    state = {name: tensor for name, tensor in learner.state_dict().items() if _belongs(name, k)}
    for name, parameter in learner.named_parameters():
        if optimizer is not None and _belongs(name, k):
            kept = optimizer.state.get(parameter, {})
            state |= {f"{OPTIMIZER}{key}.{name}": value for key, value in kept.items() if isinstance(value, Tensor)}
    return {name: tensor.full_tensor() if isinstance(tensor, DTensor) else tensor for name, tensor in state.items()}


def load_block_state(learner: BlockLocal, k: int, optimizer: Optimizer | None, state: State) -> None:
    """Give block k what `block_state` took of it. UserError: the state of another model."""
    parameters = dict(learner.named_parameters())
    weights = {name: _share(tensor, parameters.get(name)) for name, tensor in state.items() if _belongs(name, k)}
    try:
        missing, unexpected = learner.load_state_dict(weights, strict=False)
    except RuntimeError as error:
        raise _misfit(str(error)) from error
    missing = [name for name in missing if _belongs(name, k)]
    if missing or unexpected:
        raise _misfit(f"missing: {', '.join(missing) or 'none'}; unknown: {', '.join(unexpected) or 'none'}")
    for name, tensor in state.items():
        if optimizer is not None and name.startswith(OPTIMIZER):
            key, owner = name.removeprefix(OPTIMIZER).split(".", 1)
            own = tensor.to(parameters[owner].device, copy=True)
            optimizer.state[parameters[owner]][key] = _share(own, parameters[owner])


def load_weights(learner: BlockLocal, checkpoints: Checkpoints, *, minibatch: int, blocks: Iterable[int]) -> None:
    """Give so many blocks what they had after so many minibatches. UserError: see `Checkpoints.load`."""
    for k in blocks:
        load_block_state(learner, k, None, checkpoints.load(minibatch, k))


def pack(values: dict[str, Any]) -> Tensor:
    """Numbers, words, tensors, and lists and dictionaries of them, as one tensor of bytes."""
    buffer = io.BytesIO()
    torch.save(values, buffer)
    return torch.frombuffer(bytearray(buffer.getvalue()), dtype=torch.uint8)


def unpack(packed: Tensor) -> dict[str, Any]:
    """What was packed; reading makes nothing else than `pack` takes."""
    return torch.load(io.BytesIO(packed.numpy().tobytes()), map_location="cpu", weights_only=True)


def unshard(learner: BlockLocal) -> None:
    """Make room for whole parameters in place of this process's shares; what they hold is lost."""
    learner.convert(
        lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype) if isinstance(tensor, DTensor) else tensor
    )


def _share(tensor: Tensor, parameter: nn.Parameter | None) -> Tensor:
    """Of a whole tensor what this process keeps, where it keeps a share of the parameter."""
    if not isinstance(parameter, DTensor):
        return tensor
    return distribute_tensor(tensor, parameter.device_mesh, parameter.placements, src_data_rank=None)


def _belongs(name: str, k: int) -> bool:
    return name.startswith((f"blocks.{k}.", f"borders.{k}."))


def _misfit(what: str) -> UserError:
    return UserError(
        "the checkpoint does not fit the model as it is built now: "
        f"give back the code that it was trained with, or train anew ({what})"
    )
