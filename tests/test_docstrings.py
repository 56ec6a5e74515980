"""The examples in the library's docstrings give what they say."""

import doctest
import importlib
import pkgutil

import pytest

import blocklocal

MODULES = [info.name for info in pkgutil.iter_modules(blocklocal.__path__, "blocklocal.") if not info.ispkg]


@pytest.mark.parametrize("name", [name for name in MODULES if name != "blocklocal.__main__"])
def test_docstrings(name: str) -> None:
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_there_are_some() -> None:
    tried = [doctest.testmod(importlib.import_module(f"blocklocal.{name}")).attempted for name in ("learner", "split")]
    assert min(tried) > 0
