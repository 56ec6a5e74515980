"""What would read or write weights that are elsewhere is refused in one line."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.optim import Optimizer

from blocklocal.offload.part import elsewhere
from blocklocal.outline import Outline


class Guards:
    """Hooks on the containers that were cut, on modules and on optimizers.

    here: whether block k is in memory with its optimizer's state.
    """

    def __init__(
        self,
        outline: Outline,
        modules: Iterable[nn.Module],
        optimizers: Sequence[Optimizer | None],
        *,
        here: Callable[[int], bool],
    ) -> None:
        self._outline, self._here, self._open = outline, here, False
        outline.guard(self._no_call)
        self._handles: list[Any] = []
        for module in set(modules):
            self._handles.append(module.register_state_dict_pre_hook(self._no_state))
            self._handles.append(module.register_load_state_dict_pre_hook(self._no_state))
        for k, optimizer in enumerate(optimizers):
            if optimizer is not None:
                self._handles.append(optimizer.register_step_pre_hook(self._no_step(k)))

    def remove(self) -> None:
        self._outline.guard(None)
        for handle in self._handles:
            handle.remove()

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Allow state dicts, for the names that they have."""
        self._open = True
        try:
            yield
        finally:
            self._open = False

    def _no_call(self, *_: object) -> None:
        raise ValueError(
            "the model of an offloaded learner has no weights, since its blocks are elsewhere: call learner.predict(), "
            "or offloaded.end() to bring all blocks back"
        )

    def _no_state(self, module: nn.Module, *rest: object) -> None:
        if not self._open and any(elsewhere(tensor) for tensor in (*module.parameters(), *module.buffers())):
            raise ValueError(
                "the state dict of an offloaded learner has no values, since its blocks are elsewhere: "
                "offloaded.save_model(file) writes the model's, offloaded.end() brings all blocks back"
            )

    def _no_step(self, k: int) -> Callable[..., None]:
        def refuse(optimizer: Optimizer, *rest: object) -> None:
            if not self._here(k):
                raise ValueError(
                    f"optimizers[{k}] would step block {k} of an offloaded learner, which is elsewhere: pass "
                    "optimizers=offloaded.optimizers to backward(), which steps each block while it is in memory"
                )

        return refuse

    def __reduce__(self) -> Any:
        raise TypeError("an offloaded learner cannot be copied or pickled: end() it first")
