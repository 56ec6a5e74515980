"""A sweep of runs, one after another, each in its own process; after a kill, the next call completes it."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console

from blocklocal.lab import subcommand
from blocklocal.lab.errors import UserError
from blocklocal.lab.runs.folder import Run
from blocklocal.lab.runs.history import History, read
from blocklocal.lab.runs.lock import alone, holder, is_held
from blocklocal.lab.settings import Settings, flag
from blocklocal.lab.training import rules
from blocklocal.lab.training.recipes import recipe

MOST_SEEDS = 1000
WAIT = 0.1  # seconds between two looks


def complete(sweep: Sequence[Settings], *, folder: Path, console: Console) -> list[History]:
    """Train the missing runs of a sweep, which are kept in `folder`; returns the complete ones.

    A run that fails does not stop the others, unless it could not even begin. UserError: unusable settings, or settings
    that contradict an existing run.
    """
    for settings in sweep:
        settings.check()
        settings.check_alone()
        rules.find(settings.rule)
    _refuse_one_folder_for_two(sweep)
    with alone(folder):
        for settings in sweep:
            _refuse_other(settings)
        for number, settings in enumerate(sweep, start=1):
            _train(settings, console=console, title=f"run {number} of {len(sweep)}")
        return [run for settings in sweep if (run := read(settings.folder)).complete]


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


def _refuse_one_folder_for_two(sweep: Sequence[Settings]) -> None:
    """Refuse several runs for one folder, which happens if their names differ only where folder names are cut."""
    folders = Counter(settings.folder for settings in sweep)
    folder, runs = folders.most_common(1)[0]
    if runs > 1:
        raise UserError(f"{runs} of these runs would be kept in one folder, {str(folder)!r}: leave one of them out")


def _refuse_other(settings: Settings) -> None:
    run = Run(settings.folder)
    changed = read(run.path).settings.contradictions(settings) if run.exists else []
    if changed:
        raise UserError(
            f"{str(run.path)!r} holds a run with other settings ({', '.join(changed)}): choose another --out"
        )


def _train(settings: Settings, *, console: Console, title: str) -> None:
    run = Run(settings.folder)
    _wait(run, console=console)
    done = run.exists and read(run.path).complete
    if done:
        console.print(f"{title}: {run.path}, done before", soft_wrap=True)
        return
    command = [sys.executable, "-m", "blocklocal", "train", *arguments(settings)]
    if run.exists:
        command.append("--resume")
    ended = subcommand.run(command, title=f"{title}, {run.path}")
    if ended.code and not run.exists:
        raise UserError(f"the run in {str(run.path)!r} could not begin: {ended.reason}")
    if ended.code:
        console.print(f"{title} failed: {ended.reason}", soft_wrap=True)


def _wait(run: Run, *, console: Console) -> None:
    """Wait for a process that already trains the run: the sweep that started it may have been killed."""
    if is_held(run.path):
        console.print(f"waiting for {holder(run.path)}, which trains in {run.path}", soft_wrap=True)
    while is_held(run.path):
        time.sleep(WAIT)
