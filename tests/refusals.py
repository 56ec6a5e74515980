"""What a refusal of the library must say."""

import traceback
from collections.abc import Callable
from pathlib import Path

import pytest

import blocklocal as bll

PACKAGE = Path(bll.__file__).parent
REMEDIES = (
    *("pass ", "Pass ", "must ", "choose ", "need", "leave it out", "it has", "is criterion=", "does not go through"),
    *("cut outside it", "blocks at most", "build the module"),
)


def assert_refused(call: Callable[[], object], *, names: str) -> None:
    """The library itself refuses the call: in one line, which names one of the arguments ("x|y") and a remedy."""
    with pytest.raises((TypeError, ValueError)) as caught:
        call()
    message = str(caught.value)
    assert any(name in message for name in names.split("|")), message
    assert any(remedy in message for remedy in REMEDIES), message
    assert "\n" not in message, message
    assert Path(traceback.extract_tb(caught.value.__traceback__)[-1].filename).is_relative_to(PACKAGE), message
