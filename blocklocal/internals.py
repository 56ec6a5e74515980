"""Every private name of torch that this package uses; no other file reads one.

| private name | what it is for |
|---|---|
| `torch.utils._python_dispatch.TorchDispatchMode` | to see every operation, also in backward passes: bytes alive |
| `torch.nn.Module._apply` | to take part in conversions (`to`, `half`, `to_empty`), all of which end there |
| `torch.nn.Module._forward_hooks` and the other hooks | to find out whether a module has hooks |
| `torch.Tensor._version` | to find out whether a tensor was written into |

All of them are in torch 2.11 to 2.15. A torch that lacks one of them can still be used: what needs that name raises
UnsupportedTorch, and everything else works.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

CONVERSIONS = ("to", "to_empty", "type", "half", "float", "double", "bfloat16", "cpu", "cuda", "xpu", "mtia")
HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


class UnsupportedTorch(ImportError):
    """This version of torch lacks a private name that is needed."""

    def __init__(self, name: str, *, purpose: str) -> None:
        super().__init__(
            f"{purpose} needs {name}, which torch {torch.__version__} does not have; torch 2.11 to 2.15 have it"
        )


if TYPE_CHECKING:
    from torch.utils._python_dispatch import TorchDispatchMode as OperationMode
else:
    try:
        from torch.utils._python_dispatch import TorchDispatchMode as OperationMode
    except ImportError:

        class OperationMode:
            """Stand-in for a torch that does not have it."""

            def __init__(self) -> None:
                name = "torch.utils._python_dispatch.TorchDispatchMode"
                raise UnsupportedTorch(name, purpose="counting the bytes alive, as for a cut by blocks=,")


class Convertible(nn.Module):
    """A module that defines what a conversion does to it: `module.to(...)` and similar methods call `convert`."""

    def convert(self, fn: Callable[[Tensor], Tensor], *, recurse: bool = True) -> None:
        """Replace each parameter and buffer by fn(tensor)."""
        raise NotImplementedError

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True):
        self.convert(fn, recurse=recurse)
        return self


def convert(module: nn.Module, fn: Callable[[Tensor], Tensor], *, recurse: bool = True) -> None:
    """Replace each parameter and buffer of a module by fn(tensor)."""
    _private(module, "torch.nn.Module", "_apply", purpose="converting a module")(fn, recurse)


def refuse_conversions(kind: type[nn.Module]) -> None:
    """Make conversions of such modules raise UnsupportedTorch, since they would miss some of their tensors."""

    def refuse(self: nn.Module, *args: object, **kwargs: object) -> None:
        raise UnsupportedTorch("torch.nn.Module._apply", purpose=f"converting a {type(self).__name__}")

    for name in CONVERSIONS:
        setattr(kind, name, refuse)


if not hasattr(nn.Module, "_apply"):
    refuse_conversions(Convertible)


def has_hooks(module: nn.Module) -> bool:
    """Whether calling a module runs more than its forward pass."""
    return any(_private(module, "torch.nn.Module", name, purpose="looking for hooks") for name in HOOKS)


def version_of(tensor: Tensor) -> int:
    """A number that changes with every operation that writes into the tensor."""
    return _private(tensor, "torch.Tensor", "_version", purpose="seeing what writes into a tensor")


def _private(owner: object, kind: str, name: str, *, purpose: str):
    try:
        return getattr(owner, name)
    except AttributeError:
        raise UnsupportedTorch(f"{kind}.{name}", purpose=purpose) from None
