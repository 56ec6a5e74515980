"""Writes a report as Markdown with pictures, and as one HTML file that contains its pictures and loads nothing."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Mapping, Sequence

from blocklocal.lab import names
from blocklocal.lab.report.content import ReportContent, Section
from blocklocal.lab.report.plots import Plot
from blocklocal.lab.report.table import TEXT, Row, tabulate

NOTE = (
    "Accuracy, or RMSE (root mean squared error, in the unit of the target): of the last exit on the test samples, "
    "mean ± standard deviation over seeds. − BP: difference to backpropagation at otherwise equal settings, ± its "
    "standard error. Seconds: training of one run, without tests. "
    "MiB: peak memory, of tensors on a GPU, else of the whole process."
)

CSS = """
:root { color-scheme: light; }
body { margin: 0 auto; max-width: 96rem; padding: 1rem; color: #222; background: #fff;
       font: 16px/1.45 system-ui, sans-serif; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; }
th, td { padding: .25rem .6rem; border-bottom: 1px solid #ddd; text-align: left; vertical-align: top; }
th { border-bottom-color: #888; white-space: nowrap; } .number { text-align: right; white-space: nowrap; }
.plots { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 20rem), 1fr)); gap: 1rem; }
figure { margin: 0; } img { width: 100%; height: auto; } figcaption, .note { color: #555; font-size: .85rem; }
.unfinished { border-left: .3rem solid #d55e00; padding: .1rem .8rem; margin-bottom: 1rem; background: #fdf3ec; }
summary { cursor: pointer; } .names td { overflow-wrap: anywhere; }
"""


def markdown(content: ReportContent) -> str:
    """The report as Markdown, with links to the pictures in plots/."""
    parts = [f"# {names.markdown(content.title)}", _markdown_table(content.rows), NOTE]
    if content.unfinished:
        parts.append("Unfinished:\n\n" + "\n".join(f"- {names.markdown(line)}" for line in content.unfinished))
    for section in content.sections:
        parts.append(f"## {names.markdown(section.title)}")
        parts += [f"![{plot.caption}](plots/{plot.name}.svg)\n\n{plot.caption}" for plot in section.plots]
    for title, entries in (("Settings", content.settings), ("Versions", content.versions)):
        lines = "\n".join(f"| {name} | {names.markdown(value)} |" for name, value in entries.items())
        parts.append(f"## {title}\n\n| | |\n|---|---|\n{lines}")
    return "\n\n".join(parts) + "\n"


def html(content: ReportContent) -> str:
    unfinished = "".join(f"<li>{names.page(line)}</li>" for line in content.unfinished)
    warning = f'<div class="unfinished"><p>Unfinished runs:</p><ul>{unfinished}</ul></div>' if unfinished else ""
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{names.page(content.title)}</title>
<link rel="icon" href="data:,">
<style>{CSS}</style>
</head>
<body>
<h1>{names.page(content.title)}</h1>
{warning}
<div class="wide">{_html_table(content.rows)}</div>
<p class="note">{names.page(NOTE)}</p>
{"".join(_html_section(section) for section in content.sections)}
<h2>Settings and versions</h2>
<p class="note">If there are several values, they are all that occur among the runs.</p>
<div class="wide names">{_html_names(content.settings | content.versions)}</div>
</body>
</html>
"""


def _markdown_table(rows: Sequence[Row]) -> str:
    columns = tabulate(rows)
    lines = [
        list(columns),
        ["---" if name in TEXT else "---:" for name in columns],
        *([names.markdown(cell) for cell in cells] for cells in zip(*columns.values(), strict=True)),
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _html_table(rows: Sequence[Row]) -> str:
    columns = tabulate(rows)
    kinds = ["" if name in TEXT else ' class="number"' for name in columns]
    heading = "".join(f"<th{kind}>{names.page(name)}</th>" for kind, name in zip(kinds, columns, strict=True))
    body = "".join(
        "<tr>"
        + "".join(f"<td{kind}>{names.page(cell)}</td>" for kind, cell in zip(kinds, cells, strict=True))
        + "</tr>\n"
        for cells in zip(*columns.values(), strict=True)
    )
    return f"<table><thead><tr>{heading}</tr></thead>\n<tbody>{body}</tbody></table>"


def _html_section(section: Section) -> str:
    figures = "".join(_html_figure(plot) for plot in section.plots)
    return f'<h2>{names.page(section.title)}</h2>\n<div class="plots">{figures}</div>\n'


def _html_figure(plot: Plot) -> str:
    picture = b64encode(plot.svg).decode()
    return (
        f'<figure><img alt="{names.page(plot.caption)}" src="data:image/svg+xml;base64,{picture}">'
        f"<figcaption>{names.page(plot.caption)}</figcaption></figure>\n"
    )


def _html_names(entries: Mapping[str, str]) -> str:
    rows = "".join(
        f"<tr><td>{names.page(name)}</td><td>{names.page(value)}</td></tr>\n" for name, value in entries.items()
    )
    return f"<table><tbody>{rows}</tbody></table>"
