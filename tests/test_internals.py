"""Private names of torch: in one place, and what happens in a torch that does not have them."""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

import blocklocal as bll
from blocklocal import internals

PACKAGE = Path(bll.__file__).parent
NOT_STORED = Path(internals.__file__)


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name != "_"


def own_names(trees: list[ast.Module]) -> set[str]:
    """Names that the package gives itself: functions, classes, variables, attributes of self."""
    names = set()
    for node in (node for tree in trees for node in ast.walk(tree)):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            names.add(node.attr if isinstance(node.value, ast.Name) and node.value.id == "self" else "")
    return names


def foreign(tree: ast.Module, *, own: set[str]) -> Iterator[str]:
    """The private names that a file takes from elsewhere, as attributes, as imports, or in quotation marks."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node) != "os._exit":
            yield from {node.attr} - own
        elif isinstance(node, ast.ImportFrom) and not (node.module or "").startswith("blocklocal"):
            for alias in node.names:
                yield from f"{node.module}.{alias.name}".split(".")
        elif isinstance(node, ast.Import):
            for alias in node.names:
                yield from alias.name.split(".")
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "setattr", "hasattr", "delattr"):
            yield from (str(part.value) for part in node.args[1:2] if isinstance(part, ast.Constant))


def test_private_names_of_others_stand_in_one_place() -> None:
    trees = {path: ast.parse(path.read_text()) for path in sorted(PACKAGE.rglob("*.py"))}
    own = own_names([tree for path, tree in trees.items() if path != NOT_STORED])
    found = {path: set(filter(is_private, foreign(tree, own=own))) for path, tree in trees.items()}
    assert found.pop(NOT_STORED) == {"_python_dispatch", "_apply"}, "they are found where they are"
    assert {str(path): names for path, names in found.items() if names} == {}


def test_no_class_overrides_a_private_name_of_torch_elsewhere() -> None:
    overridden = set()
    for module in pkgutil.walk_packages(bll.__path__, "blocklocal."):
        for kind in vars(importlib.import_module(module.name)).values():
            if inspect.isclass(kind) and kind.__module__.startswith("blocklocal."):
                bases = [base for base in kind.__mro__ if base.__module__.split(".")[0] == "torch"]
                overridden |= {
                    (kind.__module__, name)
                    for name, value in vars(kind).items()
                    if is_private(name) and inspect.isfunction(value) and any(hasattr(base, name) for base in bases)
                }
    assert overridden == {("blocklocal.internals", "_apply")}


WITHOUT = """
import torch.utils._python_dispatch as dispatch
import torch, torch._dynamo, torch.utils.checkpoint, torch.distributed.fsdp  # which have taken it by then
del dispatch.TorchDispatchMode
"""

LIBRARY = f"""{WITHOUT}
from blocklocal import *
import blocklocal as bll
from torch import nn
layers = [nn.Linear(4, 8), nn.Sequential(nn.ReLU(), nn.Linear(8, 8)), nn.Sequential(nn.ReLU(), nn.Linear(8, 3))]
model, x = nn.Sequential(*layers), torch.randn(6, 4)
learner = bll.BlockLocal(model, at=["0", "1"], classes=3, example=x)
print(learner.backward(x, torch.arange(6) % 3).shape)
bll.BlockLocal(model, blocks=2, classes=3, example=x)
"""

COMMAND = f"""{WITHOUT}
import sys
from blocklocal.lab.cli import main
sys.exit(main(sys.argv[1:]))
"""


def run(program: str, *args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", program, *args], capture_output=True, text=True, timeout=300)


def test_a_torch_without_a_name_lacks_what_needs_it_and_nothing_else() -> None:
    done = run(LIBRARY)
    assert done.stdout.strip() == "torch.Size([3])", done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert "UnsupportedTorch" in last
    assert "TorchDispatchMode" in last
    assert f"torch {torch.__version__}" in last


def test_a_command_says_it_in_a_line(tmp_path: Path) -> None:
    done = run(COMMAND, "blocks", "mlp", "--blocks=2")
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert f"torch {torch.__version__} does not have" in done.stderr


def test_other_names(monkeypatch: pytest.MonkeyPatch) -> None:
    class Kind(internals.Convertible):
        pass

    internals.refuse_conversions(Kind)
    module = Kind()
    for convert in (module.half, module.cpu, lambda: module.to("cpu"), lambda: module.to_empty(device="cpu")):
        with pytest.raises(internals.UnsupportedTorch, match=r"torch\.nn\.Module\._apply"):
            convert()
    bare = object()
    with pytest.raises(internals.UnsupportedTorch, match=r"torch\.Tensor\._version"):
        internals.version_of(bare)  # pyright: ignore[reportArgumentType]
    with pytest.raises(internals.UnsupportedTorch, match=r"torch\.nn\.Module\._forward_pre_hooks"):
        internals.has_hooks(bare)  # pyright: ignore[reportArgumentType]


def test_hooks_and_versions_are_seen() -> None:
    module, x = nn.Linear(2, 2), torch.zeros(2)
    assert not internals.has_hooks(module)
    handle = module.register_forward_hook(lambda module, args, output: None)
    assert internals.has_hooks(module)
    handle.remove()
    module.register_full_backward_pre_hook(lambda module, gradients: None)
    assert internals.has_hooks(module)
    before = internals.version_of(x)
    x.add_(1)
    assert internals.version_of(x) > before
