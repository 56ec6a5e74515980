"""The records of metrics.jsonl as event files for TensorBoard."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from blocklocal.lab.errors import UserError


def require_tensorboard() -> None:
    """UserError: TensorBoard is not installed."""
    if find_spec("tensorboard") is None:
        raise UserError("--tensorboard needs the package tensorboard: pip install tensorboard")


@contextmanager
def event_log(
    folder: Path, records: Iterable[Mapping[str, Any]], *, wanted: bool
) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """A function that writes the record of an epoch to the event file in `folder`, which holds `records` at first.

    Every number of a record is a scalar of its own in double precision, such as train_loss/0 or borders/2/agreement.
    wanted: if not, nothing is written.
    """
    if not wanted:
        yield lambda record: None
        return
    from torch.utils.tensorboard import SummaryWriter  # takes seconds

    shutil.rmtree(folder, ignore_errors=True)  # of a run before it was resumed: the file begins anew
    with SummaryWriter(str(folder)) as writer:

        def write(record: Mapping[str, Any]) -> None:
            for name, number in scalars(record):
                writer.add_scalar(name, number, record["epoch"], new_style=True, double_precision=True)
            writer.flush()

        for record in records:
            write(record)
        yield write


def scalars(record: Any, *, name: str = "") -> Iterator[tuple[str, float]]:
    """The numbers in a record, each with the path to it."""
    if isinstance(record, Mapping | list):
        items = record.items() if isinstance(record, Mapping) else enumerate(record)
        for key, part in items:
            yield from scalars(part, name=f"{name}/{key}" if name else str(key))
    else:
        yield name, record
