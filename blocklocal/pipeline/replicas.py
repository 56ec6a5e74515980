"""Replicas of a block over the `data` dimension of the mesh: how what they learn is shared."""

from __future__ import annotations

from collections.abc import Callable

import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

DataParallel = Callable[[nn.Module, DeviceMesh], nn.Module]
"""From a block with its local loss, and the mesh of its replicas, the module to call in its place."""


def replicate(step: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """Every replica holds the whole block (DDP)."""
    if not any(parameter.requires_grad for parameter in step.parameters()):
        return step
    return DistributedDataParallel(step, process_group=mesh.get_group())


def shard(step: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """Every replica holds a share of the block's parameters, gradients and optimizer state (FSDP2)."""
    fully_shard(step, mesh=mesh)
    return step


def share_buffers(step: nn.Module, group: dist.ProcessGroup) -> None:
    """Give every replica the buffers of the first, such as the running statistics of batch normalisation."""
    for buffer in step.buffers():
        dist.broadcast(buffer, group=group, group_src=0)
