"""Imports of the lab point one way: each folder is a layer, which imports from those below it alone."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import blocklocal

PACKAGE = Path(blocklocal.__file__).parent
# From the lowest to the highest. "" is the lab's own folder: messages, names, options, settings.
LAYERS = [
    "",
    "data",
    "models",
    "tasks",
    "runs",
    "distributed",
    "training",
    "one_block",
    "bench",
    "report",
    "pipeline_bench",
    "sweeps",
]
TOP = ["commands", "cli"]


def imports(path: Path) -> set[str]:
    """The modules of this package that a file imports, anywhere in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return {name for name in found if name in MODULES}


def module(path: Path) -> str:
    name = ".".join(("blocklocal", *path.relative_to(PACKAGE).with_suffix("").parts))
    return name.removesuffix(".__init__")


FILES = {module(path): path for path in sorted(PACKAGE.rglob("*.py"))}
MODULES = set(FILES)
GRAPH = {name: imports(path) - {name} for name, path in FILES.items()}


def layer(name: str) -> str:
    """Of a module of the lab."""
    folder, _, rest = name.removeprefix("blocklocal.lab").removeprefix(".").partition(".")
    return folder if rest or folder in (*LAYERS, *TOP) else ""


LAB = [name for name in GRAPH if name.startswith("blocklocal.lab.")]


@pytest.mark.parametrize("name", LAB)
def test_a_module_of_the_lab_imports_from_its_layer_and_below(name: str) -> None:
    order = [*LAYERS, *TOP]
    for imported in GRAPH[name]:
        if imported.startswith("blocklocal.lab."):
            assert order.index(layer(imported)) <= order.index(layer(name)), f"{name} imports {imported}"


@pytest.mark.parametrize("name", [name for name in GRAPH if name not in LAB])
def test_the_library_never_imports_the_lab(name: str) -> None:
    if name != "blocklocal.__main__":  # which is the command
        assert not [imported for imported in GRAPH[name] if imported.startswith("blocklocal.lab")]


def test_the_rule_does_not_know_of_processes() -> None:
    alone = [name for name in GRAPH if name.count(".") == 1 and name not in ("blocklocal.__main__", "blocklocal.lab")]
    for name in set(alone) - {"blocklocal.pipeline"}:
        assert not [imported for imported in GRAPH[name] if imported.startswith("blocklocal.pipeline")], name


def test_no_imports_go_in_a_circle() -> None:
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join((*path, name))
        if name not in done:
            for imported in GRAPH[name]:
                visit(imported, (*path, name))
            done.add(name)

    for name in GRAPH:
        visit(name, ())


def test_every_folder_of_the_lab_is_a_layer() -> None:
    folders = {path.parent.name for path in (PACKAGE / "lab").glob("*/*.py")}
    assert folders == {*LAYERS, *TOP} - {"", "cli"}
