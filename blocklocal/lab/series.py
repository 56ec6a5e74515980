"""A series of runs, one after another, each in a process of its own; what a kill leaves undone, the next call does."""

from __future__ import annotations

import fcntl
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from rich.console import Console

from blocklocal.lab import member, rules
from blocklocal.lab.config import Settings, flag
from blocklocal.lab.errors import UserError
from blocklocal.lab.history import History, read
from blocklocal.lab.recipes import recipe
from blocklocal.lab.runs import Run

LOCK = ".lock"


def complete(series: Sequence[Settings], *, folder: Path, console: Console) -> list[History]:
    """Train what is not trained yet of a series whose runs are kept in `folder`; returns those that are finished.

    A run that fails does not stop the others, unless it could not even begin. UserError: settings that cannot be
    used, or that contradict a run which is there already.
    """
    for settings in series:
        settings.check()
        settings.check_alone()
        rules.find(settings.rule)
        _refuse_other(settings)
    with _made(folder), _alone(folder, console=console) as lock:
        for number, settings in enumerate(series, start=1):
            _train(settings, console=console, title=f"run {number} of {len(series)}", lock=lock)
    return [run for settings in series if (run := read(settings.folder)).finished]


def arguments(settings: Settings) -> list[str]:
    """The settings as arguments of `bll train`."""
    args = [settings.data]
    for name, value in asdict(settings).items():
        if isinstance(value, bool):
            if value != getattr(recipe(settings.data), name):
                args.append(flag(name) if value else flag(f"no_{name}"))
        elif isinstance(value, tuple):
            args += [flag(name), *value] if value else []
        elif name != "data" and value is not None:
            args += [flag(name), str(value)]
    return args


def _refuse_other(settings: Settings) -> None:
    run = Run(settings.folder)
    changed = run.settings().contradictions(settings) if run.exists else []
    if changed:
        raise UserError(
            f"{str(run.path)!r} holds a run with other settings ({', '.join(changed)}): choose another --out"
        )


def _train(settings: Settings, *, console: Console, title: str, lock: int) -> None:
    run = Run(settings.folder)
    if run.exists and read(run.path).finished:
        console.print(f"{title}: {run.path}, done before", soft_wrap=True)
        return
    command = [sys.executable, "-m", "blocklocal", "train", *arguments(settings)]
    if run.exists:
        command.append("--resume")
    ended = member.call(command, title=f"{title}, {run.path}", lock=lock)
    if ended.code and not run.exists:
        raise UserError(f"the run in {str(run.path)!r} could not begin: {ended.reason}")
    if ended.code:
        console.print(f"{title} failed: {ended.reason}", soft_wrap=True)


@contextmanager
def _made(folder: Path) -> Iterator[None]:
    """The folder, which is gone again where no run in it could begin."""
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except UserError:
        if new and [path.name for path in folder.iterdir()] == [LOCK]:
            (folder / LOCK).unlink()
            for path in new:
                path.rmdir()
        raise


@contextmanager
def _alone(folder: Path, *, console: Console) -> Iterator[int]:
    """Holds a lock on the folder: its file descriptor, to be handed on to processes.

    The lock ends with the last process that holds it, so that a training process which has outlived a killed series
    is waited for, and is not resumed while it still writes.
    """
    with (folder / LOCK).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            console.print(f"waiting for a run that still goes on in {folder}", soft_wrap=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield file.fileno()
