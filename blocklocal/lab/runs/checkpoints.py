"""Checkpoints of a run: one part per block, written during training by the process that trains the block."""

from __future__ import annotations

import re
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from blocklocal.lab.errors import UserError
from blocklocal.lab.runs.checkpoint_part import Part, State, Value
from blocklocal.lab.runs.folder import Run

STEP = re.compile(r"step-(0|[1-9][0-9]{0,17})")


class EachInTurn(Mapping[int, State]):
    """The states of these blocks, each made when it is asked for."""

    def __init__(self, blocks: Iterable[int], state: Callable[[int], State]) -> None:
        self._blocks, self._state = list(blocks), state

    def __getitem__(self, k: int) -> State:
        return self._state(k)

    def __iter__(self) -> Iterator[int]:
        return iter(self._blocks)

    def __len__(self) -> int:
        return len(self._blocks)


class Checkpoints:
    """The folders step-N/block-K below `path`, where N is the number of minibatches that the block has learnt from.

    Step N is a consistent cut once the parts of all blocks are complete: a block needs only messages from another, and
    these follow from the data. So no process waits for another to save. The last complete cut is kept.

    only: the block that is trained, if it is alone.
    """

    def __init__(self, path: Path, *, blocks: int, only: int | None = None) -> None:
        self.path, self.blocks, self.only = path, blocks, only
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None

    def save(self, step: int, states: Mapping[int, State], *, together: bool = True) -> None:
        """Copy the states of some blocks and write them while training continues, after waiting for earlier writes.

        together: whether there is memory for copies of all; otherwise each is written before the next is asked for. If
        they cannot be written, there is a warning, nothing is left behind, and the last complete cut is kept.
        """
        self.wait()
        whole = EachInTurn(states, lambda k: _on_cpu(states[k], copy=together))
        self._pending = self._writer.submit(self._write, step, dict(whole) if together else whole)
        if not together:
            self.wait()

    def wait(self) -> None:
        """Wait until everything is saved or given up. UserError: a tensor of a kind that cannot be saved."""
        pending, self._pending = self._pending, None
        try:
            if pending is not None:
                pending.result()
        except OSError as error:
            warnings.warn(f"a checkpoint was not written ({error}); training continues", stacklevel=2)

    def latest(self) -> int | None:
        """The last complete cut, or None."""
        return max((step for step in self._steps() if self._whole(step)), default=None)

    def lost(self, *, epochs: int) -> bool:
        """Whether none is whole, though this number of epochs was recorded, so that the first one's must be.

        The checkpoint of an epoch is written while the next one trains, and is waited for only when that was recorded.
        """
        return epochs > 2 and self.latest() is None

    def load(self, step: int, k: int) -> State:
        """The state of block k. UserError: the part is damaged, of another block, or of an older version."""
        return self._part(step, k).read()

    def discard_others(self, step: int | None) -> None:
        """Delete all cuts except this one: parts of later ones belong to training that is repeated."""
        for other in self._steps():
            if other != step:
                shutil.rmtree(self.path / f"step-{other}")

    def _write(self, step: int, states: Mapping[int, State]) -> None:
        try:
            for k, state in states.items():
                self._part(step, k).write(state)
        except (OSError, SafetensorError) as error:
            self._forget(step, states)
            free = shutil.disk_usage(self.path).free / 2**20
            raise OSError(f"{self.path / f'step-{step}'}: {error}; {free:,.0f} MiB are free") from error
        except (KeyError, ValueError) as error:
            self._forget(step, states)
            raise UserError(f"a checkpoint cannot hold the state of this model ({error})") from error
        last = self.latest()
        for old in self._steps():
            if last is not None and old < last:
                self._forget(old, states)

    def _forget(self, step: int, blocks: Iterable[int]) -> None:
        """Remove what can be removed; other processes may have parts in the cut too."""
        for k in blocks:
            shutil.rmtree(self._part(step, k).path, ignore_errors=True)
        with suppress(OSError):
            (self.path / f"step-{step}").rmdir()

    def _steps(self) -> list[int]:
        found = [STEP.fullmatch(path.name) for path in self.path.glob("step-*") if path.is_dir()]
        return sorted(int(match[1]) for match in found if match)

    def _whole(self, step: int) -> bool:
        needed = range(self.blocks) if self.only is None else (self.only,)
        return all(self._part(step, k).whole for k in needed)

    def _part(self, step: int, k: int) -> Part:
        return Part(self.path / f"step-{step}" / f"block-{k}", step, k)


def resume_hint(run: Run) -> str:
    """From where a stopped run can be resumed, in words."""
    facts = run.facts()
    checkpoints, steps = Checkpoints(run.checkpoints, blocks=facts["blocks"], only=facts.get("block")), facts["steps"]
    latest = checkpoints.latest()
    if latest is None:
        return "no checkpoint has been written yet"
    epoch, rest = divmod(latest, steps)
    place = f"epoch {epoch + 1}, step {rest} of {steps}" if rest else f"epoch {epoch}"
    return f"{str(run.path)!r} keeps the checkpoint of {place}"


@contextmanager
def resumable(run: Run, checkpoints: Checkpoints, *, launched: bool = False) -> Iterator[None]:
    """What stops a run says how to resume it, once the last checkpoint is written.

    launched: by `bll launch`, which says so itself where the machine fails.
    """
    try:
        yield
    except KeyboardInterrupt:
        checkpoints.wait()
        raise KeyboardInterrupt(resume_hint(run)) from None
    except (UserError, OSError) as error:
        checkpoints.wait()
        if launched and not isinstance(error, UserError):
            raise
        raise (UserError if isinstance(error, UserError) else OSError)(f"{error}; {resume_hint(run)}") from error


def _on_cpu(state: State, *, copy: bool) -> State:
    """With all tensors contiguous on the CPU, no two in the same memory. copy: nor in that of the state."""
    taken: set[int] = set()

    def apart(value: Value) -> Value:
        if not isinstance(value, Tensor):
            return value
        place = value.untyped_storage().data_ptr()
        again = place in taken
        taken.add(place)
        return value.detach().to("cpu", copy=copy or again, memory_format=torch.contiguous_format).contiguous()

    return {name: apart(value) for name, value in state.items()}
