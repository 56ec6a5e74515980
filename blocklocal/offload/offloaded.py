"""The learner whose blocks live elsewhere: which of them is here, and what is saved of all."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from blocklocal.arguments import require
from blocklocal.exits import ExitPool
from blocklocal.inputs import check_closure, check_owners, stepped_by
from blocklocal.offload.guards import Guards
from blocklocal.offload.part import outlined, require_apart, stand_in
from blocklocal.offload.start import Start
from blocklocal.offload.store import Store
from blocklocal.offload.tensor_file import write
from blocklocal.offload.unit import Unit
from blocklocal.outline import Outline


class Chain(Protocol):
    """What is needed of a `BlockLocal`."""

    blocks: nn.ModuleList
    borders: nn.ModuleList
    pool: ExitPool
    offloaded: Offloaded | None

    @property
    def model(self) -> nn.Module: ...
    def block_parameters(self, k: int) -> list[nn.Parameter]: ...
    def convert(self, fn: Callable[[Tensor], Tensor]) -> None: ...
    def modules(self) -> Iterator[nn.Module]: ...


class Offloaded:
    """The blocks of a learner in a store, one of them in memory at a time: what `BlockLocal.offload` returns.

    optimizers: one for each block, or None where there is nothing to train, for `backward` and for learning rate
    schedules. progress: what was passed to the last `save`, if the run was resumed.

    While a block is elsewhere, its parameters have their shapes, but no values. What would need them is refused: a call
    of the model, its state dict, a step of the optimizer of a block that is not at work.

    >>> import blocklocal as bll
    >>> learner = bll.BlockLocal([nn.Linear(8, 16), nn.Linear(16, 3)], classes=3, example=torch.randn(2, 8))
    >>> offloaded = learner.offload(bll.HostStore(), optimizer=lambda weights: torch.optim.SGD(weights, lr=0.1))
    >>> x, y = torch.randn(4, 8), torch.tensor([0, 2, 1, 0])
    >>> losses = learner.backward(x, y, optimizers=offloaded.optimizers)
    >>> logits = learner.eval().predict(x)
    >>> offloaded.end()
    >>> bool((learner.model(x) == logits).all())
    True
    """

    def __init__(
        self,
        chain: Chain,
        outline: Outline,
        store: Store,
        *,
        optimizer: Callable[[list[nn.Parameter]], Optimizer] | None,
        device: torch.device,
        seed: int,
        weights: Mapping[str, Tensor] | None,
        resume: bool,
    ) -> None:
        self._chain, self._store, self._device = chain, store, device
        borders = [*chain.borders, None]
        self._units = [Unit(k, block, borders[k]) for k, block in enumerate(chain.blocks)]
        self._resident: Unit | None = None
        self.progress: Any = None
        counts = Counter(tensor for unit in self._units for tensor in unit.tensors().values())
        for unit in self._units:
            unit.check()
            unit.common = {name for name, tensor in unit.tensors().items() if counts[tensor] > 1}

        saved = self._saved(resume=resume)
        meta = any(tensor.is_meta for tensor in counts)
        if weights is not None and (not meta or resume):
            raise ValueError("weights= begins a model on the meta device: load them into this one before offload()")
        start = None
        if meta:
            _require_all_meta(counts, chain.model)
            start = Start(chain.model, [unit.modules for unit in self._units], seed=seed, weights=weights)
        elif not resume:
            require_apart((name, t) for unit in self._units for name, t in unit.weights().items())
            for unit in self._units:
                unit.own.put(store)
        self._leave()
        try:
            for unit in self._units:
                unit.optimizer = self._made(optimizer, unit.k)
                if unit.training.here() and not resume:  # some optimizers have a state from the beginning
                    unit.training.put(store)
                    unit.training.release()
                if start is not None and not resume:
                    unit.start = partial(start, unit.k, device=device)
            check_owners(self.optimizers, [chain.block_parameters(unit.k) for unit in self._units])
            if saved is not None:
                for unit, state in zip(self._units, saved["units"], strict=True):
                    unit.resume(state, device=device)
                chain.pool.set_extra_state(saved["exits"])
                self.progress = saved["progress"]
        except BaseException:
            self._undo(meta=meta)
            raise
        self._guards = Guards(outline, [*chain.modules(), *chain.model.modules()], self.optimizers, here=self._here)

    @property
    def optimizers(self) -> tuple[Optimizer | None, ...]:
        return tuple(unit.optimizer for unit in self._units)

    def bring(self, k: int) -> None:
        """Bring block k into memory, after the one before it has left; with its optimizer's state if gradients are on.

        ValueError: the block before has gradients that its optimizer has not used. OSError: there is no room to put it.
        Neither loses anything.
        """
        learns, unit = torch.is_grad_enabled(), self._units[k]
        following = self._units[(k + 1) % len(self._units)]
        with torch.inference_mode(False), torch.no_grad():
            if self._resident is not unit:
                self._put_back()
            self._resident = unit
            unit.fetch(self._store, device=self._device, learns=learns)
            if following is not unit:
                following.prefetch(self._store, device=self._device, learns=learns)

    def check_steps(self, optimizers: Sequence[Optimizer | None] | None) -> None:
        """ValueError: not the optimizers of this object, whose state comes and goes with the blocks."""
        pairs = zip(optimizers or (), self.optimizers, strict=False)
        if optimizers is None or any(one is not mine and stepped_by(one) for one, mine in pairs):
            raise ValueError(
                "an offloaded block leaves with its gradients used, so that none can be accumulated: pass "
                "optimizers=offloaded.optimizers to backward(), or None in the place of some"
            )

    def save(self, progress: Any = None) -> None:
        """Save the present state of all blocks and optimizers, for `offload(..., resume=True)`, in one operation.

        progress: whatever else a resumed run needs, such as the step, the states of schedules and of the random number
        generators, made of tensors, numbers, strings, lists and dictionaries. ValueError: something that cannot be
        saved. OSError: there is no room; what was saved before is kept.
        """
        self._require_active()
        with torch.inference_mode(False), torch.no_grad():
            for unit in self._units:
                if unit.start is not None:
                    self.bring(unit.k)
            self._put_back()
            self._store.save(
                {
                    "units": [unit.state() for unit in self._units],
                    "exits": self._chain.pool.get_extra_state(),
                    "progress": progress,
                }
            )

    def save_model(self, file: str | os.PathLike[str]) -> None:
        """Write the model's state dict, with its own names, as one safetensors file, with one block in memory.

        OSError: it cannot be written; what the file held before is kept.
        """
        self._require_active()
        require(file, str | os.PathLike, name="file", needed="pass the path of a file")
        with self._guards.opened():
            state = self._chain.model.state_dict(keep_vars=True)
        for name, tensor in state.items():
            require(tensor, Tensor, name=f"{name} of the state dict", needed="a safetensors file holds tensors alone")
        owner = {id(tensor): unit.k for unit in self._units for tensor in unit.weights().values()}
        names = sorted(state, key=lambda name: (-state[name].element_size(), owner.get(id(state[name]), -1)))

        def values() -> Iterator[Tensor]:
            for name in names:
                if id(state[name]) in owner:
                    self.bring(owner[id(state[name])])
                yield state[name]

        path = Path(file)
        new = path.with_name(f"{path.name}.part")
        try:
            with torch.no_grad():
                write(new, outlined({name: state[name] for name in names}), values())
            new.replace(path)
        except BaseException:
            new.unlink(missing_ok=True)
            raise

    def end(self) -> None:
        """Bring all blocks back into memory; the learner is then as without offloading, with these optimizers."""
        self._require_active()
        with torch.inference_mode(False), torch.no_grad():
            for unit in self._units:
                unit.fetch(self._store, device=self._device, learns=True)
        self._guards.remove()
        self._chain.offloaded = None

    def _put_back(self) -> None:
        if self._resident is not None:
            self._resident.put_back(self._store)
            self._resident = None

    def _here(self, k: int) -> bool:
        return self._resident is self._units[k] and self._units[k].here()

    def _require_active(self) -> None:
        if self._chain.offloaded is not self:
            raise ValueError("this offloading has ended: call offload() again")

    def _saved(self, *, resume: bool) -> Any:
        """What is to be resumed. ValueError: the store does not fit."""
        if not resume:
            if self._store.saved:
                raise ValueError("the store holds a saved run: pass resume=True to go on with it, or another folder")
            return None
        saved = self._store.resume()
        if len(saved["units"]) != len(self._units):
            raise ValueError(
                f"the saved state has {len(saved['units'])} blocks, and the learner {len(self._units)}: build the same"
            )
        for unit, state in zip(self._units, saved["units"], strict=True):
            unit.require_same(state)
        return saved

    def _leave(self) -> None:
        """Put stand-ins in the place of all weights, on the device where they are trained."""
        outlines = [outlined(unit.own.here()) for unit in self._units]
        going = {id(tensor) for unit in self._units for tensor in unit.own.here().values()}

        def fn(tensor: Tensor) -> Tensor:
            if id(tensor) in going:
                return stand_in(tensor, device=self._device)
            return torch.empty_like(tensor, device=self._device) if tensor.is_meta else tensor.to(self._device)

        self._chain.convert(fn)
        for unit, outline in zip(self._units, outlines, strict=True):
            unit.own.leave(outline)

    def _undo(self, *, meta: bool) -> None:
        """Make the learner what it was, after a failure."""
        if meta:
            self._chain.convert(lambda tensor: torch.empty_like(tensor, device="meta"))
        else:
            for unit in self._units:
                unit.own.fetch(self._store, device=self._device)

    def _made(self, optimizer: Callable[[list[nn.Parameter]], Optimizer] | None, k: int) -> Optimizer | None:
        parameters = self._chain.block_parameters(k)
        if optimizer is None or not parameters:
            return None
        made = optimizer(parameters)
        require(made, Optimizer, name="the return value of optimizer", needed="return a torch.optim.Optimizer")
        check_closure(made, name="the optimizer")
        return made

    def __reduce__(self) -> Any:
        raise TypeError("an offloaded learner cannot be copied or pickled: end() it first")


def _require_all_meta(tensors: Mapping[Tensor, int], model: nn.Module) -> None:
    """ValueError: only some of the tensors are on the meta device, or parameters have two names there."""
    if not all(tensor.is_meta for tensor in tensors):
        raise ValueError("some of the model is on the meta device, and some is not: build all of it there, or nothing")
    several = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    if len(several) > len({id(tensor) for _, tensor in several}):
        raise ValueError("the model ties tensors, which the meta device cannot give memory as one: build it for real")
