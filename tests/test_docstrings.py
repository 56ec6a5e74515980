"""The examples in docstrings give what they say, and every public name has one."""

import doctest
import importlib
import inspect
import pkgutil
import warnings
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import HashStore  # pyright: ignore[reportPrivateImportUsage]
from torch.distributed.device_mesh import init_device_mesh

import blocklocal as bll
from blocklocal import alignment, offload, pipeline

MODULES = [info.name for info in pkgutil.walk_packages(bll.__path__, "blocklocal.")]
GIVEN = {"bll": bll, "torch": torch, "nn": nn, "init_device_mesh": init_device_mesh}


@pytest.fixture
def process() -> Iterator[None]:
    """A group of this process alone, which the examples of the pipeline take for granted."""
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("name", [name for name in MODULES if name != "blocklocal.__main__"])
def test_docstrings(name: str, request: pytest.FixtureRequest) -> None:
    module = importlib.import_module(name)
    if name.startswith("blocklocal.pipeline"):
        request.getfixturevalue("process")
    torch.manual_seed(0)
    with warnings.catch_warnings():
        assert doctest.testmod(module, extraglobs=GIVEN).failed == 0


def public() -> list[tuple[str, object]]:
    """Classes and functions. Constants have no docstring of their own, and stand in examples of their terms."""
    names = [
        (module.__name__, name, getattr(module, name))
        for module in (bll, offload, pipeline, alignment)
        for name in module.__all__
    ]
    return [(f"{module}.{name}", thing) for module, name, thing in names if inspect.isclass(thing) or callable(thing)]


@pytest.mark.parametrize(("name", "thing"), public(), ids=[name for name, _ in public()])
def test_a_public_name_has_an_example(name: str, thing: object) -> None:
    assert ">>> " in (inspect.getdoc(thing) or ""), name
