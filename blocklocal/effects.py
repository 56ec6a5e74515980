"""Side effects of a forward pass, and the context that it runs in: what a trace loses or freezes."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache

import torch
from torch import Tensor, nn

from blocklocal.internals import version_of


class State:
    """The attributes and buffers of a module, to be restored after its forward pass has been traced."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.attributes = dict(vars(module))
        self.buffers = {n: (b, b.clone(), version_of(b)) for n, b in module.named_buffers(recurse=False)}

    def restore(self) -> list[str]:
        """Restore them, and return the names of those that had changed."""
        now, then = vars(self.module), self.attributes
        changed = [name for name in {**then, **now} if name not in then or then[name] is not now.get(name)]
        for name in changed:
            now.pop(name, None)
            if name in then:
                now[name] = then[name]
        for name, (buffer, value, version) in self.buffers.items():
            if getattr(self.module, name) is not buffer or version_of(buffer) != version:
                setattr(self.module, name, buffer)
                buffer.copy_(value)
                changed.append(name)
        return changed


class Draws:
    """The states of the random number generators, to be restored after a trace."""

    def __init__(self) -> None:
        self.python, self.torch, self.cuda = random.getstate(), torch.get_rng_state(), _cuda()

    def restore(self) -> bool:
        """Restore them, and return whether anything had been drawn."""
        drawn = random.getstate() != self.python or not torch.equal(torch.get_rng_state(), self.torch)
        drawn |= not all(map(torch.equal, _cuda(), self.cuda))
        random.setstate(self.python)
        torch.set_rng_state(self.torch)
        if self.cuda:
            torch.cuda.set_rng_state_all(self.cuda)
        return drawn


def context() -> tuple[object, ...]:
    """What decides how an operation runs, apart from its arguments."""
    casts = [torch.get_autocast_dtype(d) if torch.is_autocast_enabled(d) else None for d in devices()]
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), *casts


@contextmanager
def ambient(*, enabled: bool) -> Iterator[None]:
    """Turn gradients and autocast both on or both off: a context entered inside shows in one of the two settings."""
    with ExitStack() as contexts:
        contexts.enter_context(torch.set_grad_enabled(enabled))
        for device in devices():
            contexts.enter_context(torch.autocast(device, torch.float16, enabled=enabled))
        yield


def _cuda() -> list[Tensor]:
    return torch.cuda.get_rng_state_all() if torch.cuda.is_available() and torch.cuda.is_initialized() else []


@cache
def devices() -> list[str]:
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return ["cpu"] if accelerator is None else ["cpu", accelerator.type]
