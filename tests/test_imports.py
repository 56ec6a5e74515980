"""Imports go one way, as CONTRIBUTING.md says."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = re.findall(r"^\| `blocklocal/lab/(\w+)/`", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE)
MODULES = sorted((ROOT / "blocklocal").rglob("*.py"))


def imported(file: Path) -> set[str]:
    """Full names of what a module takes from this package."""
    package = file.relative_to(ROOT).parent.parts
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom):
            base = ".".join((*package[: len(package) + 1 - node.level], *filter(None, [node.module])))
            source = base if node.level else node.module or ""
            names |= {f"{source}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return {name for name in names if name.startswith("blocklocal.")}


def place(name: str) -> tuple[str, ...]:
    """("lab", folder or "") or ("pipeline",), ("alignment",), ("library",) of a module's full name."""
    parts = name.split(".")
    if parts[1] == "lab":
        return ("lab", next((folder for folder in FOLDERS if parts[2:3] == [folder]), ""))
    return (parts[1] if parts[1] in ("pipeline", "alignment") else "library",)


def test_the_table_has_every_folder() -> None:
    found = {file.parent.name for file in MODULES if file.parent.parent.name == "lab"}
    assert found == set(FOLDERS)


@pytest.mark.parametrize("file", MODULES, ids=lambda file: str(file.relative_to(ROOT / "blocklocal")))
def test_imports(file: Path) -> None:
    here = place(".".join(file.relative_to(ROOT).with_suffix("").parts))
    if file.name in ("__main__.py", "cli.py"):
        return  # the entry, and the command that finds the others
    for name in imported(file):
        there = place(name)
        if here[0] != "lab":
            assert there[0] != "lab", f"the library imports {name}"
            if here[0] != "library" and there[0] != "library":
                assert there == here, f"{here[0]} imports {name}"
        elif there[0] == "lab" and there[1]:
            assert here[1], f"a file of lab imports {name}"
            assert FOLDERS.index(there[1]) <= FOLDERS.index(here[1]), f"{here[1]} imports {name}, which is below it"
