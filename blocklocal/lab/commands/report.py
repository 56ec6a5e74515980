"""`bll report`: the results of runs as Markdown, pictures and one HTML file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from blocklocal.lab import outputs
from blocklocal.lab.arguments import parse
from blocklocal.lab.errors import UserError
from blocklocal.lab.report.content import ReportContent, compose
from blocklocal.lab.report.render import html, markdown
from blocklocal.lab.report.table import print_table
from blocklocal.lab.runs.history import find, read
from blocklocal.lab.terminal import Terminal

PLOTS, MARKDOWN = "plots", "report.md"  # in the report's folder


@dataclass(frozen=True)
class Options:
    """Report on runs, finished or not: tables, plots as PNG and SVG, Markdown, and an HTML page in one file."""

    runs: Positional[tuple[str, ...]]
    """folders of runs, or folders that contain them"""
    out: str | None = None
    """folder of the report (default: report/ in the given folder, or runs/report for several)"""
    html: str | None = None
    """file of the page (default: report.html in the report's folder)"""

    @property
    def home(self) -> Path:
        if self.out is not None:
            return Path(self.out)
        return Path(self.runs[0], "report") if len(self.runs) == 1 else Path("runs", "report")


def main(args: Sequence[str]) -> None:
    options = parse(Options, args, prog="bll report")
    if not options.runs:
        raise UserError("RUNS is missing: name the folders of one or more runs, such as bll report runs/NAME")
    paths = list({path.resolve(): path for name in options.runs for path in find(Path(name))}.values())
    page = Path(options.html) if options.html else options.home / "report.html"
    check(folder=options.home, page=page)
    content = compose([read(path) for path in paths])
    write(content, folder=options.home, page=page)
    print_table(content.rows, title=content.title)
    for line in content.unfinished:
        Terminal().print(f"unfinished: {line}", soft_wrap=True)
    told = {"runs": len(paths), "unfinished": len(content.unfinished), "out": str(options.home), "html": str(page)}
    print(json.dumps(told), flush=True)


def check(*, folder: Path, page: Path) -> None:
    """Check that a report can be written there. UserError: it cannot."""
    with outputs.room(folder, flag="--out"), outputs.room(folder / PLOTS, flag="--out"):
        outputs.check_file(folder / MARKDOWN, flag="--out")
        outputs.check_file(page, flag="--html")


def write(content: ReportContent, *, folder: Path, page: Path) -> None:
    """Write report.md and plots/ into the folder, and the page."""
    pictures = folder / PLOTS
    pictures.mkdir(parents=True, exist_ok=True)
    page.parent.mkdir(parents=True, exist_ok=True)
    contents = {page: html(content).encode(), folder / MARKDOWN: markdown(content).encode()}
    for plot in content.plots:
        contents |= {pictures / f"{plot.name}.png": plot.png, pictures / f"{plot.name}.svg": plot.svg}
    for file, data in contents.items():
        outputs.write(file, lambda part, data=data: part.write_bytes(data))
