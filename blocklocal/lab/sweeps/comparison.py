"""Compares several runs: trains those that are missing, then shows one table."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from blocklocal.lab.errors import UserError
from blocklocal.lab.report.seed_groups import gather
from blocklocal.lab.report.table import Reference, print_table, summarise
from blocklocal.lab.settings import Settings
from blocklocal.lab.sweeps.sweep import complete
from blocklocal.lab.terminal import Terminal


def lay_side_by_side(
    sweep: Sequence[Settings], *, folder: Path, title: str, reference: Reference | None = None
) -> None:
    """Complete the sweep, and print its table and, as the last line, its rows as JSON. UserError: runs failed."""
    finished = complete(sweep, folder=folder, console=Terminal(stderr=True))
    rows = summarise(gather(finished), reference=reference)
    if rows:
        print_table(rows, title=title)
        print(json.dumps({"rows": [row.plain() for row in rows]}), flush=True)
    if len(finished) < len(sweep):
        missing = sorted({str(settings.folder) for settings in sweep} - {str(run.path) for run in finished})
        raise UserError(
            f"{len(missing)} of {len(sweep)} runs failed: {', '.join(missing)}; the same command tries them again"
        )


def listed(names: str, *, flag: str) -> list[str]:
    """The names in a comma-separated list. UserError: there is none, or one appears twice."""
    found = [name.strip() for name in names.split(",")]
    if not all(found) or len(set(found)) < len(found):
        raise UserError(f"{flag} {names!r}: name each once, separated by commas")
    return found
