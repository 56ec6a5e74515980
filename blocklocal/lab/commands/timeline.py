"""`bll timeline`: what each process of a run did and when, as a picture and in numbers (the paper's Fig. 2)."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from blocklocal.lab import outputs
from blocklocal.lab.arguments import parse
from blocklocal.lab.errors import UserError
from blocklocal.lab.ranges import Range
from blocklocal.lab.report.timeline import chrome_trace, draw, summary, table
from blocklocal.lab.terminal import Terminal
from blocklocal.pipeline.analysis.timeline import Timeline
from blocklocal.pipeline.trace import load

FOLDER = "trace"  # in the run's folder: one file of records per rank


@dataclass(frozen=True)
class Options:
    """Draw what each process of a traced run did and when, and report how well they were used."""

    run: Annotated[Positional[str], arg(metavar="RUN")]
    """folder of a run made with --trace"""
    out: str | None = None
    """picture, .svg or .png (default: timeline.svg in the run's folder); a Chrome trace (.json) goes next to it"""
    minibatches: Annotated[int, Range(least=0)] = 12
    """number of minibatches in the picture, from the first; 0: all"""


def main(args: Sequence[str]) -> None:
    options = parse(Options, args, prog="bll timeline")
    picture = Path(options.out or Path(options.run, "timeline.svg"))
    chrome = picture.with_suffix(".json")
    files = find(Path(options.run))
    outputs.check_picture(picture, flag="--out")
    outputs.check_file(chrome, flag="--out")
    try:
        timeline = Timeline(load(files))
        rows, lines, figure = table(timeline), summary(timeline), draw(timeline, minibatches=options.minibatches)
    except (ValueError, ZeroDivisionError) as error:
        raise UserError(f"the trace of {options.run!r} cannot be drawn: {error}") from error
    picture.parent.mkdir(parents=True, exist_ok=True)
    kind = picture.suffix[1:]
    outputs.write(picture, lambda part: figure.savefig(part, format=kind, bbox_inches="tight", dpi=150))
    outputs.write(chrome, lambda part: part.write_text(json.dumps(chrome_trace(timeline))))
    Terminal().print(rows)
    print("\n".join(lines))
    Terminal().print(f"wrote {picture}, and {chrome} for chrome://tracing or ui.perfetto.dev", soft_wrap=True)


def find(run: Path) -> list[Path]:
    """The trace files of a run. UserError: it has none."""
    folder = run / FOLDER
    files = sorted(file for file in folder.glob("*.jsonl") if file.is_file()) if os.path.isdir(folder) else []
    if not files:
        raise UserError(f"{str(run)!r} holds no trace: train with --trace over several processes")
    return files
