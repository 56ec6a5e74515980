"""Blocks that are not at work live elsewhere: in host memory or in files."""

from blocklocal.offload.files import FileStore
from blocklocal.offload.host import HostStore
from blocklocal.offload.offloaded import Offloaded
from blocklocal.offload.store import Store

__all__ = ["FileStore", "HostStore", "Offloaded", "Store"]
