"""A block whose output no longer tells the targets apart."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence


class CollapseWarning(UserWarning):
    """A block's output no longer tells the targets apart.

    >>> warnings.simplefilter("error", CollapseWarning)  # so that a loop which calls `diagnose` stops
    """


def warn_of_collapse(reports: Sequence[dict[str, float]]) -> None:
    """Issue a CollapseWarning for each border whose report, see `Border.diagnose`, shows a collapsed block."""
    for k, report in enumerate(reports):
        ratio = report["variance_ratio"]
        if math.isnan(ratio):
            warnings.warn(f"block {k} returns no finite number for any sample", CollapseWarning, stacklevel=3)
        elif not ratio > 1e-3:
            warnings.warn(
                f"block {k} has collapsed: its output no longer tells the targets apart "
                f"(variance ratio {ratio:.1e}); raise the weight of bll.Predictive()",
                CollapseWarning,
                stacklevel=3,
            )
