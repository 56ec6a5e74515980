"""Replicas of a block over the `data` dimension of the mesh: how they share what they learn."""

from __future__ import annotations

from collections.abc import Callable

import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from blocklocal.arguments import require, require_module

DataParallel = Callable[[nn.Module, DeviceMesh], nn.Module]
"""Makes the module to call in place of a block with its local loss, from that and the mesh of its replicas."""


def replicate(step: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """Every replica holds the whole block (DDP).

    >>> mesh = init_device_mesh("cpu", (1,), mesh_dim_names=("data",))
    >>> type(replicate(nn.Linear(2, 2), mesh)).__name__
    'DistributedDataParallel'
    """
    _check(step, mesh)
    if not any(parameter.requires_grad for parameter in step.parameters()):
        return step
    return DistributedDataParallel(step, process_group=mesh.get_group())


def shard(step: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """Every replica holds a share of the block's parameters, gradients and optimizer state (FSDP2).

    >>> mesh = init_device_mesh("cpu", (1,), mesh_dim_names=("data",))
    >>> type(shard(nn.Linear(2, 2), mesh)).__name__
    'FSDPLinear'
    """
    _check(step, mesh)
    fully_shard(step, mesh=mesh)
    return step


def dimensions(mesh: DeviceMesh | None) -> tuple[dist.ProcessGroup | None, DeviceMesh | None]:
    """The group of one pipeline, and the mesh of a block's replicas if there are any."""
    if not dist.is_initialized():
        raise ValueError("a pipeline needs processes: call torch.distributed.init_process_group() first")
    if mesh is None:
        return None, None
    require(mesh, DeviceMesh, name="mesh", needed='pass what init_device_mesh() returns, with a dimension "block"')
    names = mesh.mesh_dim_names or ()
    if "block" not in names or not set(names) <= {"block", "data"}:
        raise ValueError(f'mesh with dimensions {names}: a pipeline needs "block", and may have "data"')
    replicas = mesh["data"] if "data" in names and mesh["data"].size() > 1 else None
    return mesh.get_group("block"), replicas


def _check(step: nn.Module, mesh: DeviceMesh) -> None:
    require_module(step, name="step")
    require(mesh, DeviceMesh, name="mesh", needed="pass the mesh of the replicas")


def share_buffers(step: nn.Module, group: dist.ProcessGroup) -> None:
    """Give every replica the buffers of the first, such as the running statistics of batch normalisation."""
    for buffer in step.buffers():
        dist.broadcast(buffer, group=group, group_src=0)
