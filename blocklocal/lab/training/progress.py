"""Shows the progress of a run on standard error: a live table on a terminal, one line per epoch elsewhere."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from blocklocal.lab.tasks.measure import ACCURACY, Measure


@dataclass(frozen=True)
class Plan:
    """The length of a run: `epochs` of `steps` steps, of which `done` epochs and `rest` steps are done.

    unit: what samples are called. judged_by: what is shown of its tests.
    """

    epochs: int
    steps: int
    batch_size: int
    blocks: int
    done: int
    rest: int = 0
    unit: str = "images"
    judged_by: Measure = ACCURACY

    def tests(self, record: dict[str, Any]) -> list[float]:
        """What is shown of the record of an epoch: a value for each exit, and for all exits combined."""
        return [*(self.judged_by.exit(record, k) for k in range(self.blocks)), self.judged_by.combined(record)]


class Display(Protocol):
    """Shows a run; a context manager, entered during training."""

    def __enter__(self) -> Display: ...

    def __exit__(self, *error: object) -> None: ...

    def step(self, epoch: int, step: int, losses: Sequence[float | None]) -> None:
        """`step` steps of epoch 1, 2, ... are done. losses: recent ones of each block; None: in another process."""
        ...

    def epoch(self, record: dict[str, Any]) -> None:
        """An epoch is done and tested. record: its line of metrics.jsonl."""
        ...


def display(console: Console, plan: Plan) -> Display:
    """The display for this console."""
    return LiveDisplay(console, plan) if console.is_terminal else PlainDisplay(console, plan)


class PlainDisplay:
    """A line per epoch, and one per minute within an epoch."""

    def __init__(self, console: Console, plan: Plan) -> None:
        self.console, self.plan = console, plan
        self.spoke = time.monotonic()

    def __enter__(self) -> PlainDisplay:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def step(self, epoch: int, step: int, losses: Sequence[float | None]) -> None:
        if time.monotonic() - self.spoke > 60:
            self._say(f"epoch {epoch}/{self.plan.epochs}, step {step}/{self.plan.steps}: loss {_join(losses, '.3f')}")

    def epoch(self, record: dict[str, Any]) -> None:
        plan = self.plan
        measure = plan.judged_by
        *exits, combined = map(measure.show, plan.tests(record))
        unit = f" {measure.unit}".rstrip()
        together = f", all exits {combined}{unit}" if len(exits) > 1 else ""
        self._say(
            f"epoch {record['epoch']}/{plan.epochs}: loss {_join(record['train_loss'], '.3f')}, "
            f"test {measure.label} {' '.join(exits)}{unit}{together}, {record['seconds']:.1f} s"
        )

    def _say(self, line: str) -> None:
        self.console.print(line, soft_wrap=True)
        self.spoke = time.monotonic()


class LiveDisplay:
    """Loss and test result per block above a bar with rate and remaining time."""

    def __init__(self, console: Console, plan: Plan) -> None:
        self.plan = plan
        self.losses: Sequence[float | None] = [None] * plan.blocks
        self.tests: Sequence[float | None] = [None] * (plan.blocks + 1)  # the last: all exits combined
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f} %"),
            Rate(plan.batch_size, unit=plan.unit),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
        )
        self.task = self.bar.add_task(
            f"epoch {min(plan.done + 1, plan.epochs)}/{plan.epochs}",
            total=plan.epochs * plan.steps,
            completed=plan.done * plan.steps + plan.rest,
        )
        self.live = Live(console=console, refresh_per_second=5, get_renderable=self._render)

    def __enter__(self) -> LiveDisplay:
        self.live.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.live.stop()

    def step(self, epoch: int, step: int, losses: Sequence[float | None]) -> None:
        self.losses = [old if new is None else new for old, new in zip(self.losses, losses, strict=True)]
        completed = (epoch - 1) * self.plan.steps + step
        self.bar.update(self.task, completed=completed, description=f"epoch {epoch}/{self.plan.epochs}")

    def epoch(self, record: dict[str, Any]) -> None:
        self.losses = record["train_loss"]
        self.tests = self.plan.tests(record)

    def _render(self) -> Group:
        table = Table("block", box=None, padding=(0, 2, 0, 0), header_style="bold")
        table.add_column("training loss", justify="right")
        measure = self.plan.judged_by
        table.add_column(f"test {measure.label}", justify="right")
        tests = ["-" if test is None else f"{measure.show(test, finer=1)} {measure.unit}" for test in self.tests]
        for k, (loss, test) in enumerate(zip(self.losses, tests[:-1], strict=True)):
            table.add_row(str(k), "-" if loss is None else f"{loss:.4f}", test)
        if len(self.losses) > 1:
            table.add_row("all", "", tests[-1])
        return Group(table, self.bar)


class Rate(ProgressColumn):
    """Samples per second, where the task counts steps."""

    def __init__(self, batch_size: int, *, unit: str) -> None:
        super().__init__()
        self.batch_size, self.unit = batch_size, unit

    def render(self, task: Task) -> Text:
        return Text(
            f"{task.speed * self.batch_size:,.0f} {self.unit}/s" if task.speed else "", style="progress.data.speed"
        )


def _join(values: Sequence[float | None], form: str) -> str:
    return " ".join("-" if value is None else format(value, form) for value in values)
