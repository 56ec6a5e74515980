"""A run that is interrupted while it trains."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest


@contextmanager
def interrupted(trainer: Any, *, epoch: int, step: int = 0) -> Iterator[None]:
    """As if Ctrl-C were hit in that epoch, after so many of its steps, whenever a trainer of this class trains."""
    whole = trainer.train

    def broken(self: Any, number: int, *, begin: int) -> Iterator[Any]:
        for done, losses in enumerate(whole(self, number, begin=begin), start=begin):
            if (number, done) == (epoch, step):
                raise KeyboardInterrupt
            yield losses

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "train", broken)
        yield
