"""The README is run: its Python example, and the parsing of each command that it shows."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def commands() -> list[list[str]]:
    lines = [line for block in blocks("sh") for line in block.splitlines()]
    return [shlex.split(line, comments=True) for line in lines if line.startswith("bll ")]


@pytest.mark.parametrize("source", blocks("python"))
def test_python_example_learns(source: str) -> None:
    scope: dict = {}
    exec(source, scope)
    accuracy = (scope["logits"].argmax(1) == scope["y"]).float().mean()
    assert accuracy > 0.5, "the model that was passed in fits its 256 samples far better than chance"


@pytest.mark.parametrize("command", commands(), ids=" ".join)
def test_options_of_the_shown_commands_exist(command: list[str]) -> None:
    help_text = subprocess.run(
        [sys.executable, "-m", "blocklocal", command[1], "--help"], capture_output=True, text=True, check=True
    ).stdout
    for option in command:
        assert not option.startswith("--") or option in help_text, f"{option} is not an option of bll {command[1]}"


def test_relative_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("http") or (ROOT / target).exists(), target
