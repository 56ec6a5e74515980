"""README and docs are run: their Python, in order and in one namespace per page, the options of the commands that they
show, and their links."""

import io
import re
import shlex
from collections import OrderedDict
from contextlib import redirect_stdout
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import nn

import blocklocal as bll
from blocklocal.lab import cli
from blocklocal.lab.models import MODELS
from blocklocal.lab.training.rules import RULES
from blocklocal.pipeline.analysis import programs, simulator

ROOT = Path(__file__).parent.parent
PAGES = [*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("docs/**/*.md"))]
NOT_RUN = "<!-- not run: "  # and the reason, on the line before a block of Python

BLOCK = re.compile(r"(<!-- .*? -->\n)?^```(\w+)\n(.*?)^```", re.DOTALL | re.MULTILINE)


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: Path, language: str) -> list[tuple[str, str]]:
    """(the comment before it, its source) for each block of this language."""
    return [(mark, source) for mark, kind, source in BLOCK.findall(page.read_text()) if kind == language]


def guide() -> dict[str, Any]:
    """What the guide takes as given: a small network of images in four layers, and batches for it."""

    def layer(channels: int) -> nn.Module:
        return nn.Sequential(nn.Conv2d(channels, 8, 3, padding=1), nn.ReLU())

    top = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))
    names = ("layer1", "layer2", "layer3", "classifier")
    model = nn.Sequential(OrderedDict(zip(names, (layer(3), layer(8), layer(8), top), strict=True)))
    x, y = torch.randn(8, 3, 8, 8), torch.arange(8)
    batches = [(x, y)] * 2
    chain: dict[str, Any] = {"stem": layer(3), "body": layer(8), "classifier": nn.Sequential(*top)}
    return {"bll": bll, "torch": torch, "model": model, "x": x, "y": y, "loader": batches, "held_out": batches} | chain


GIVEN = {
    "docs/guide.md": guide,
    "docs/distributed.md": lambda: vars(programs) | vars(simulator),
}


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=name)
def test_python_runs_and_prints_about_what_stands_beside_it(page: Path) -> None:
    torch.manual_seed(0)
    scope: dict[str, Any] = GIVEN.get(name(page), dict)() | {"__name__": "page"}
    for mark, source in blocks(page, "python"):
        if mark.startswith(NOT_RUN):
            continue
        with patch.dict(RULES), patch.dict(MODELS), redirect_stdout(io.StringIO()) as printed:
            exec(compile(source, name(page), "exec"), scope)
        stated = re.findall(r"^print\(.*\)(?:  # (.*))?$", source, re.MULTILINE)
        if any(stated):
            for line, comment in zip(printed.getvalue().splitlines(), stated, strict=True):
                expected = figures(comment)
                # other processors and versions of torch round otherwise: within six points
                assert not expected or figures(line) == pytest.approx(expected, abs=6), comment


def figures(text: str) -> list[float]:
    return [float(figure) for figure in re.findall(r"\d+\.?\d*", text)]


def commands() -> list[list[str]]:
    sources = [source for page in PAGES for _, source in blocks(page, "sh")]
    lines = [line for source in sources for line in source.replace("\\\n", " ").splitlines()]
    return [shlex.split(line, comments=True) for line in lines if line.startswith("bll ")]


@cache
def help_text(*command: str) -> str:
    with redirect_stdout(io.StringIO()) as text, pytest.raises(SystemExit) as stop:
        cli.main([*command, "--help"])
    assert stop.value.code in (None, 0)
    return text.getvalue()


@pytest.mark.parametrize("command", commands(), ids=" ".join)
def test_options_of_the_shown_commands_exist(command: list[str]) -> None:
    pipeline = ["--pipeline"] if "--pipeline" in command else []
    text = help_text(command[1], *pipeline)
    if "--only" in command:
        text += help_text(command[1], "--only", "0")
    for option in command:
        known = option in pipeline or option in text
        assert not option.startswith("--") or known, f"{option} is not an option of bll {command[1]}"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_relative_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```|^    .*?$|`[^`\n]*`", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = target.partition("#")
        if path.startswith(("http://", "https://")):
            continue
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{name(page)}: {target}"
        assert file.is_relative_to(ROOT), f"{name(page)}: {target} is outside the repository"
        if anchor and file.suffix == ".md":
            assert anchor in anchors(file), f"{name(page)}: {target}"


def anchors(page: Path) -> set[str]:
    """Of the headings, as GitHub and the site make them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
