"""Blocks over processes: a one-way pipeline on torch.distributed."""

from blocklocal.pipeline.pipeline import Pipeline
from blocklocal.pipeline.placement import balanced, spread
from blocklocal.pipeline.replicas import replicate, shard
from blocklocal.pipeline.schedule import Action, Placement, schedule
from blocklocal.pipeline.trace import Record, Trace, load

__all__ = [
    "Action",
    "Pipeline",
    "Placement",
    "Record",
    "Trace",
    "balanced",
    "load",
    "replicate",
    "schedule",
    "shard",
    "spread",
]
