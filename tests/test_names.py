"""Names that hold brackets, escape characters, pipes, dollars or thousands of letters are harmless in every medium."""

import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path

import pytest
from run_folders import write_run

from blocklocal.lab import cli, names
from blocklocal.lab.terminal import Terminal

WILD = [
    "[red]brackets[/red] [/] [link=x]y",
    "esc\x1b[31mape\x1b]0;title\x07",
    "pipe | and `code` and *stars*",
    "<b>bold</b> & <script>alert(1)</script>",
    "dollars $x^2$ and $\\frac{1}{",
    "colons :smile: :boom:",
    "_under_ \\back # hash ~~gone~~",
    "two\nlines\tand\rmore",
    "right\u202eleft\u200b",
    "☃ snow & ümlaut",
    "letters " + "n" * 200,
]


@pytest.mark.parametrize("name", WILD)
def test_a_name_in_each_medium(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    told = names.sentence(name)
    assert told.isprintable()
    assert len(told) < 400
    assert "\n" not in names.markdown(name)
    assert re.sub(r"\\(.)", r"\1", names.markdown(told)).replace("\\", "") == told.replace("\\", "")
    assert not re.search(r"(?<!\\)[|`*<$]", names.markdown(name).replace("\\\\", ""))
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, attrs: pytest.fail(tag)
    parser.feed(names.page(name))
    Terminal().print(name, soft_wrap=True)
    shown = capsys.readouterr().out
    assert shown == names.plain(name) + "\n"
    assert shown.replace("\n", "").isprintable()


def test_a_name_is_shortened_in_its_middle() -> None:
    assert names.short("short") == "short"
    long = names.short("".join(map(chr, range(ord("a"), ord("z") + 1))) * 4)
    assert len(long) == names.NAME
    assert long.startswith("abcdefgh")
    assert long.endswith("stuvwxyz")


@pytest.fixture
def pages(tmp_path: Path) -> tuple[Path, list[str]]:
    """Runs of which each has another wild name for its data and its model."""
    data = [f"data/{name.replace('/', '.')}" for name in WILD[:6:2] + WILD[1:6:2] + WILD[-1:]]
    for k, name in enumerate(data):
        settings = {"data": name, "model": f"m:{name[5:45]}"}
        write_run(tmp_path / "runs" / f"{k}", accuracies=[0.5, 0.6], epochs=3 + k, blocks=1, **settings)  # pyright: ignore[reportArgumentType]
    return tmp_path, data


def test_a_report_on_wild_names(pages: tuple[Path, list[str]], capsys: pytest.CaptureFixture[str]) -> None:
    folder, data = pages
    assert cli.main(["report", str(folder / "runs"), f"--out={folder / 'report'}"]) == 0
    out, err = capsys.readouterr()
    assert out.replace("\n", "").isprintable()
    assert err == ""
    assert "[red]bracke" in out
    text = (folder / "report" / "report.md").read_text(encoding="utf-8")
    table = [line for line in text.splitlines() if line.startswith("| ") and "±" not in line]
    runs = [line for line in table if "resnet" not in line][: len(data)]
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in runs}) == 1, "no cell has a bar of its own"
    assert text.replace("\n", "").isprintable()
    page = (folder / "report" / "report.html").read_text(encoding="utf-8")
    assert "<script" not in page
    assert "<b>" not in page
    assert page.replace("\n", "").isprintable()
    plots = sorted((folder / "report" / "plots").glob("*.svg"))
    titles = {
        "".join(node.itertext()) for plot in plots for node in ElementTree.parse(plot).iter() if "text" in node.tag
    }
    assert any("dollars $x^2$ and $\\frac{1}{" in title for title in titles), "a formula is not set as one"
    assert all(len(plot.name) < 120 for plot in plots)
    assert len(plots) == 3 * len(data), "each has its own plots"


def test_an_error_shows_no_escape_character(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "esc\x1b[31mape[red]"]) == 2
    assert "esc\\x1b[31mape[red]" in capsys.readouterr().err
