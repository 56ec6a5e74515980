"""What offloading needs of the place where blocks live."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor


class Store(Protocol):
    """Keeps tensors by name under a key, such as "block-3". Outlines, tensors on the meta device, say what is wanted.

    >>> import blocklocal as bll
    >>> store: Store = bll.HostStore()
    >>> store.put("block-0", {"weight": torch.eye(2)})
    >>> store.get("block-0", {"weight": torch.empty(2, 2, device="meta")}, device=torch.device("cpu"))
    {'weight': tensor([[1., 0.],
            [0., 1.]])}
    """

    def put(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Keep these values instead of those before; the tensors may be released as soon as this returns.

        OSError: there is no room. The values before are then still kept.
        """
        ...

    def get(self, key: str, outlines: Mapping[str, Tensor], *, device: torch.device) -> dict[str, Tensor]:
        """New tensors on `device` with the values that are kept."""
        ...

    def prefetch(self, key: str, outlines: Mapping[str, Tensor], *, device: torch.device) -> None:
        """The same will be asked for next."""
        ...

    @property
    def saved(self) -> bool:
        """Whether there is a state to resume from."""
        ...

    def save(self, state: Any) -> None:
        """Make what is kept now, and `state`, what a later process resumes from; all of it or nothing."""
        ...

    def resume(self) -> Any:
        """Go back to what was saved last; returns its `state`."""
        ...
