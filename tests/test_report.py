"""`bll report`: its numbers, its pictures, and a page that needs nothing else."""

import json
import math
import re
import shutil
import subprocess
import xml.etree.ElementTree as ElementTree
from base64 import b64decode
from html.parser import HTMLParser

import numpy as np
import pytest
from run_folders import write_run

from blocklocal.lab import cli
from blocklocal.lab.report.content import compose
from blocklocal.lab.runs.history import find, read

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
QUIET = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
QUIET += ["--disable-background-networking", "--disable-component-update"]


class Page(HTMLParser):
    """The cells of each table row, and whatever could be fetched or run."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.sources: list[str] = []
        self.tags: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.sources += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data")]
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_data(self, data):
        if (self.get_starttag_text() or "").startswith(("<td", "<th")):
            self.rows[-1][-1] += data.strip()


def write_runs(folder):
    """Two rules with two seeds each on one data set; on another, one rule that is under way."""
    for seed, accuracy in enumerate((0.90, 0.92)):
        write_run(folder / f"bp{seed}", rule="bp", seed=seed, accuracies=[0.6, 0.8, accuracy], blocks=1)
        write_run(folder / f"bll{seed}", seed=seed, accuracies=[0.5, 0.7, accuracy - 0.03])
    write_run(folder / "late", data="data/cifar100", accuracies=[0.3, 0.4], epochs=5)
    return folder


@pytest.fixture
def runs(tmp_path):
    return write_runs(tmp_path / "runs")


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = write_runs(tmp_path_factory.mktemp("report") / "runs")
    assert cli.main(["report", str(folder)]) == 0
    return folder / "report"


def test_last_line_says_where_it_is(runs, tmp_path, capsys):
    page = tmp_path / "elsewhere" / "page.html"
    assert cli.main(["report", str(runs / "bp0"), str(runs / "late"), f"--out={tmp_path}/r", f"--html={page}"]) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert told == {"runs": 2, "unfinished": 1, "out": f"{tmp_path}/r", "html": str(page)}
    assert page.read_text().startswith("<!DOCTYPE html>")
    assert (tmp_path / "r" / "report.md").exists()


def test_table_of_the_page_has_the_numbers(report):
    heading, *rows = Page((report / "report.html").read_text()).rows[:4]
    rows = {(row[0], row[1]): dict(zip(heading, row, strict=True)) for row in rows}
    assert set(rows) == {("cifar10", "bp"), ("cifar10", "bll"), ("cifar100", "bll")}
    bp, bll = np.array([90.0, 92.0]), np.array([87.0, 89.0])
    row = rows["cifar10", "bll"]
    assert row["accuracy %"] == f"{bll.mean():.2f} ± {bll.std(ddof=1):.2f}"
    error = np.sqrt(bp.var(ddof=1) / 2 + bll.var(ddof=1) / 2)
    assert row["− BP"] == f"−{bp.mean() - bll.mean():.2f} ± {error:.2f}"
    assert rows["cifar100", "bll"]["epochs"] == "2 of 5"


def test_markdown_has_the_same_table_and_its_pictures(report):
    text = (report / "report.md").read_text()
    table = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]
    page = Page((report / "report.html").read_text())
    assert [[cell.strip() for cell in line] for line in (table[0], *table[2:5])] == page.rows[:4]
    pictures = re.findall(r"!\[.+\]\((.+)\)", text)
    assert len(pictures) == len(set(pictures)) == 3 + 4 + 3 + 4
    for picture in pictures:
        ElementTree.parse(report / picture)
        assert (report / picture).with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_page_fetches_nothing(report):
    text = (report / "report.html").read_text()
    page = Page(text)
    assert all(source.startswith("data:") for source in page.sources)
    assert not page.tags & {"script", "iframe", "object", "embed"}
    assert "http" not in re.sub(r"base64,[^\"]+", "", text)
    assert "url(" not in text
    assert "@import" not in text
    pictures = [b64decode(source.partition(",")[2]).decode() for source in page.sources if "svg" in source]
    assert len(pictures) == 14
    for picture in pictures:
        assert ElementTree.fromstring(picture).tag == "{http://www.w3.org/2000/svg}svg"
        assert 'href="http' not in picture


def test_page_names_what_is_unfinished(report):
    text = (report / "report.html").read_text()
    assert "late: 2 of 5 epochs" in text
    assert "late: 2 of 5 epochs" in (report / "report.md").read_text()
    assert "bp0: " not in text


def test_settings_and_versions_are_there(report):
    rows = dict(row for row in Page((report / "report.html").read_text()).rows if len(row) == 2)
    assert rows["rule"] == "bll; bp"
    assert rows["data"] == "data/cifar10; data/cifar100"
    assert rows["torch"] == "2.13.0"
    assert rows["git commit"] == "0123abc"


def test_lines_are_the_records(runs):
    content = compose([read(path) for path in find(runs)])
    plots = {plot.name: plot.figure for plot in content.plots}
    files = [runs / f"bll{seed}" / "metrics.jsonl" for seed in (0, 1)]
    records = [[json.loads(line) for line in file.read_text().splitlines()] for file in files]
    exits = 100 * np.array([[record["test_accuracy"] for record in run] for run in records])  # seed, epoch, exit
    losses = np.array([[record["train_loss"] for record in run] for run in records])
    ratios = np.array([[[b["variance_ratio"] for b in record["borders"]] for record in run] for run in records])

    def drawn(name):
        lines = [line for axes in plots[name].axes for line in axes.get_lines()]
        return {line.get_label(): np.column_stack(line.get_data()) for line in lines}

    accuracy = drawn("accuracy-cifar10-resnet20")
    np.testing.assert_allclose(accuracy["bll"], np.column_stack([[1, 2, 3], exits.mean(0)[:, -1]]))
    assert set(accuracy) == {"bll", "bp"}
    assert set(drawn("accuracy-cifar100-resnet20")) == {"bll (unfinished)"}
    for k in range(4):
        np.testing.assert_allclose(drawn("exits-cifar10-resnet20-bll")[f"block {k}"][:, 1], exits.mean(0)[:, k])
        np.testing.assert_allclose(drawn("local-cifar10-resnet20-bll")[f"block {k}"][:, 1], losses.mean(0)[:, k])
    for k in range(3):
        np.testing.assert_allclose(drawn("variance-cifar10-resnet20-bll")[f"border {k}"][:, 1], ratios.mean(0)[:, k])
    seconds = np.cumsum([record["seconds"] for record in records[0]])
    np.testing.assert_allclose(drawn("time-cifar10-resnet20")["bll"], np.column_stack([seconds, exits[0, :, -1]]))


def test_angles_are_drawn_where_records_have_them(tmp_path):
    deep = {f"deep{k}": [80.0, 70.0] for k in range(30)}
    for seed, last in enumerate(([60.0, math.nan], [50.0, 44.0])):
        angles = {"stem": [95.0, 85.0 + seed], **deep, "fc": [0.0, 0.0], "late": [None, 30.0], "odd": last}
        accuracies = [0.3, 0.4 + seed / 10]
        write_run(tmp_path / f"fa{seed}", rule="fa", seed=seed, accuracies=accuracies, blocks=1, angles=angles)
    write_run(tmp_path / "bp", rule="bp", accuracies=[0.5, 0.6], blocks=1)
    assert cli.main(["report", str(tmp_path)]) == 0
    content = compose([read(path) for path in find(tmp_path)])
    (plot,) = (plot for plot in content.plots if plot.name.startswith("angles"))
    assert plot.name == "angles-cifar10-resnet20-fa"
    (axes,) = plot.figure.axes
    *layers, mark = axes.get_lines()
    drawn = {line.get_label(): np.asarray(line.get_ydata()) for line in layers}
    assert list(drawn) == ["stem", *deep, "fc", "odd", "late"]
    np.testing.assert_array_equal(drawn["stem"], [95, 85.5])
    np.testing.assert_array_equal(drawn["late"], [np.nan, 30])
    np.testing.assert_array_equal(drawn["odd"], [55, 44])
    assert list(np.unique(np.asarray(mark.get_ydata()))) == [90]
    assert {0, 30, 60, 90} <= {*axes.get_yticks()}
    (legend,) = plot.figure.legends
    named = [text.get_text() for text in legend.get_texts()]
    assert (named[0], named[-1], len(named)) == ("stem", "late", 12)
    report = tmp_path / "report"
    assert (report / "plots" / f"{plot.name}.png").read_bytes().startswith(b"\x89PNG")
    text = (report / "plots" / f"{plot.name}.svg").read_text()
    assert "degrees to the true gradient" in text
    assert f"](plots/{plot.name}.svg)" in (report / "report.md").read_text()
    sources = Page((report / "report.html").read_text()).sources
    assert text in [b64decode(source.partition(",")[2]).decode() for source in sources if "svg" in source]


def test_a_rule_has_the_same_colour_everywhere(runs):
    plots = {plot.name: plot.figure for plot in compose([read(path) for path in find(runs)]).plots}
    (ten, _), (hundred,) = (plots[f"accuracy-{data}-resnet20"].axes[0].get_lines() for data in ("cifar10", "cifar100"))
    assert (ten.get_label(), hundred.get_label()) == ("bll", "bll (unfinished)")
    assert ten.get_color() == hundred.get_color()


def test_names_cover_neither_the_title_nor_the_panel(tmp_path):
    for blocks in (2, 3, 4, 5, 6):
        write_run(
            tmp_path / str(blocks),
            head="residual",
            at=[f"layer{k}" for k in range(1, blocks)],
            blocks=blocks,
            accuracies=[0.5, 0.6],
        )
    write_run(tmp_path / "mean", head=None, at=[], accuracies=[0.5, 0.6])
    plots = {plot.name: plot.figure for plot in compose([read(path) for path in find(tmp_path)]).plots}
    names = [line.get_label() for line in plots["accuracy-cifar10-resnet20"].axes[0].get_lines()]
    assert "bll" in names
    assert "bll, at layer1 layer2, head residual" in names
    for figure in [*plots.values()][:7]:  # of all groups, and of the first
        figure.draw_without_rendering()
        panel, title = figure.axes[0].get_window_extent(), figure.get_suptitle()
        others = [legend.get_window_extent() for legend in figure.legends]
        (shown,) = (text.get_window_extent() for text in figure.texts if text.get_text() == title)
        assert not any(shown.overlaps(box) or panel.overlaps(box) for box in others), title
        assert shown.x1 < figure.bbox.x1
        assert panel.width > figure.bbox.width / 2


def test_same_runs_give_the_same_picture(runs):
    first, second = (compose([read(runs / "bll0")]).plots[0] for _ in range(2))
    assert (first.svg, first.png) == (second.svg, second.png)


def test_half_a_last_line_is_an_epoch_under_way(runs):
    with (runs / "late" / "metrics.jsonl").open("a") as file:
        file.write('{"epoch": 3, "test_acc')
    assert len(read(runs / "late").records) == 2


def test_folders_that_are_no_runs(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert cli.main(["report", str(tmp_path / "empty")]) == 2
    assert "holds no run" in capsys.readouterr().err
    assert cli.main(["report", str(tmp_path / "nowhere")]) == 2
    assert "is not a folder" in capsys.readouterr().err
    assert cli.main(["report"]) == 2
    assert "RUNS is missing" in capsys.readouterr().err
    assert not list(tmp_path.rglob("report"))


def test_run_without_an_epoch(tmp_path, capsys):
    write_run(tmp_path / "run", accuracies=[], epochs=3)
    assert cli.main(["report", str(tmp_path / "run")]) == 2
    assert "none of these runs has finished an epoch" in capsys.readouterr().err


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed: the page is not rendered")
@pytest.mark.parametrize("width", [500, 1200])
def test_page_in_a_browser(report, tmp_path, width):
    measure = """<script>document.title = JSON.stringify({
        width: window.innerWidth, content: document.documentElement.scrollWidth,
        pictures: [...document.images].map(image => image.naturalWidth > 0 && image.width > 250)})</script></body>"""
    page = tmp_path / "measured.html"
    page.write_text((report / "report.html").read_text().replace("</body>", measure))
    command = [CHROMIUM, *QUIET, f"--user-data-dir={tmp_path}/profile", f"--window-size={width},900", "--dump-dom"]
    dom = subprocess.run([*command, page.as_uri()], capture_output=True, text=True, check=True, timeout=120).stdout
    (title,) = re.findall(r"<title>(.*?)</title>", dom)
    found = json.loads(title)
    assert found["content"] <= found["width"] == width, "the page is wider than the screen"
    assert found["pictures"] == [True] * 14


def test_a_run_whose_epochs_are_all_recorded_is_finished_without_its_weights(tmp_path, capsys):
    for name, epochs in (("whole", 2), ("half", 3)):
        write_run(tmp_path / name, rule=f"bll{'-paper' * (name == 'half')}", accuracies=[0.6, 0.8], epochs=epochs)
    (tmp_path / "whole" / "model.safetensors").unlink()
    assert cli.main(["report", str(tmp_path), f"--out={tmp_path / 'report'}"]) == 0
    output = capsys.readouterr().out
    assert "half: 2 of 3 epochs" in output
    assert "whole: " not in output
    assert json.loads(output.splitlines()[-1])["unfinished"] == 1
    assert not read(tmp_path / "whole").complete
