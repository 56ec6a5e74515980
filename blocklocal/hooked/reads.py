"""Which parameters and buffers each part of a forward pass reads."""

from __future__ import annotations

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from blocklocal.hooked.values import tensors


class Reads(TorchFunctionMode):
    """Records, while a model runs, the names of the parameters and buffers that its parts read, one after the other.

    all: a set for each part; `begin` starts the next. Reading a shape or a type does not count. Code of a ScriptModule
    is not seen.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.names = {id(tensor): name for name, tensor in [*model.named_parameters(), *model.named_buffers()]}
        self.all: list[set[str]] = [set()]

    def begin(self) -> None:
        self.all.append(set())

    def __torch_function__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        if getattr(func, "__name__", "") != "__get__" or isinstance(output, Tensor):
            self.all[-1].update(self.names[id(t)] for t in tensors((args, kwargs or {})) if id(t) in self.names)
        return output
