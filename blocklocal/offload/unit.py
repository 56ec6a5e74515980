"""One block with its border and its optimizer, which come and go together."""

from __future__ import annotations

from collections.abc import Callable, Container
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from blocklocal.arguments import describe
from blocklocal.offload.optimizer_state import load_optimizer, optimizer_state, optimizer_tensors
from blocklocal.offload.part import Part, give_back, outlined, require_apart
from blocklocal.offload.saved import require_same, shapes
from blocklocal.offload.store import Store


class Unit:
    """Block k and its border. Weights and buffers are one part, which predictions need alone; the optimizer's state is
    the other.

    common: names of tensors that other blocks have too, which stay in memory. start: gives first values to a block that
    has none yet, once.
    """

    def __init__(self, k: int, block: nn.Module, border: nn.Module | None) -> None:
        self.k, self.modules = k, nn.ModuleDict({"block": block} | ({} if border is None else {"border": border}))
        self.common: Container[str] = ()
        self.start: Callable[[], None] | None = None
        self.optimizer: Optimizer | None = None
        self.own = Part(f"block-{k}", self.weights)
        self.training = Part(f"optimizer-{k}", self._training)
        self._learns = False

    def weights(self) -> dict[str, Tensor]:
        """Parameters and buffers by their names in the learner, without the common ones."""
        return {name: tensor for name, tensor in self.tensors().items() if name not in self.common}

    def tensors(self) -> dict[str, Tensor]:
        parts = self.modules.items()
        return {
            f"{part}s.{self.k}.{name}": tensor
            for part, module in parts
            for name, tensor in (*module.named_parameters(), *module.named_buffers())
        }

    def check(self) -> None:
        """ValueError: what cannot be offloaded."""
        if any(isinstance(module, torch.jit.ScriptModule) for module in self.modules.modules()):
            raise ValueError(f"block {self.k} has a ScriptModule, which cannot be offloaded: pass its original module")
        for name, tensor in self.tensors().items():
            if tensor.grad is not None:
                raise ValueError(f"{name!r} has a gradient: step, and zero_grad(), before offload()")
            if type(tensor.data) is not Tensor or tensor.layout is not torch.strided:
                raise ValueError(f"{name!r} is {describe(tensor)}: only plain, dense tensors can be offloaded")

    def fetch(self, store: Store, *, device: torch.device, learns: bool) -> None:
        """Bring this block into memory; if it learns, its optimizer's state too."""
        self._learns |= learns
        if self.start is not None:
            outlines = self.own.wanted().items()
            self.own.fill({name: torch.empty_like(outline, device=device) for name, outline in outlines})
            self.start()
            self.start, self._learns = None, True
        for part in self._parts(learns):
            part.fetch(store, device=device)

    def prefetch(self, store: Store, *, device: torch.device, learns: bool) -> None:
        if self.start is None:
            for part in self._parts(learns):
                part.prefetch(store, device=device)

    def put_back(self, store: Store) -> None:
        """Put this block back, where it may have changed. ValueError: it has gradients that were not used."""
        for name, tensor in self.weights().items():
            if tensor.grad is not None:
                raise ValueError(
                    f"{name!r} has a gradient that no optimizer has used, and block {self.k} is to leave: step "
                    f"offloaded.optimizers[{self.k}] and clear its gradients before the next block's turn"
                )
        require_apart((*self.own.here().items(), *self.training.here().items()))
        changed = self._learns or self.own.written() or any(module.training for module in self.modules.modules())
        for part, kept in ((self.own, changed and self.start is None), (self.training, True)):
            if kept and part.here():
                part.put(store)
            part.release()
        give_back()
        self._learns = False

    def here(self) -> bool:
        """Whether all of this block is in memory."""
        return not self.own.outlines and not self.training.outlines

    def state(self) -> dict[str, Any]:
        """What `resume` needs beside the store."""
        return {
            "shapes": shapes(self.own.outlines),
            "staying": {name: tensor.cpu() for name, tensor in self._staying().items()},
            "optimizer": optimizer_state(self.optimizer, self._names(), self.training.outlines),
        }

    def require_same(self, state: dict[str, Any]) -> None:
        """ValueError: the state is that of another model."""
        require_same(state["shapes"], shapes(outlined(self.own.here())))

    @torch.no_grad()
    def resume(self, state: dict[str, Any], *, device: torch.device) -> None:
        """Become what `state` was taken from, once fetched. ValueError: its optimizer was another."""
        outlines = load_optimizer(self.optimizer, state["optimizer"], self._names(), device=device)
        self.training.leave(outlines)
        tensors = self.tensors()
        for name, value in state["staying"].items():
            tensors[name].data = value.to(device)  # not copied: its elements may share memory

    def _staying(self) -> dict[str, Tensor]:
        common = {name: tensor for name, tensor in self.tensors().items() if name in self.common}
        return common | self.own.staying()

    def _parts(self, learns: bool) -> list[Part]:
        return [self.own, self.training] if learns else [self.own]

    def _training(self) -> dict[str, Tensor]:
        return optimizer_tensors(self.optimizer, self._names())

    def _names(self) -> dict[int, str]:
        return {id(tensor): name for name, tensor in self.weights().items()}
