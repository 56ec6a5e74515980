"""`bll compare`: the same model on the same data under several rules, with several seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated

from tyro.conf import Suppress

from blocklocal.lab.arguments import parse
from blocklocal.lab.ranges import Range
from blocklocal.lab.settings import CHANGES, Settings, folder_name, last_name
from blocklocal.lab.sweeps.comparison import lay_side_by_side, listed
from blocklocal.lab.sweeps.sweep import MOST_SEEDS
from blocklocal.lab.training import rules
from blocklocal.lab.training.recipes import recipe


@dataclass(frozen=True)
class Options(Settings):
    """Train a model under several rules with several seeds, one run after another, and compare the results.

    All other settings apply to every run. The same command continues where it was stopped.
    """

    rule: Suppress[str] = "bp"
    resume: Suppress[bool] = False
    trust: Suppress[bool] = False
    rules: str = "bp,bll"
    """rules, separated by commas"""
    seeds: Annotated[int, Range(least=1, most=MOST_SEEDS)] = 3
    """runs of every rule: the first with --seed, each further one with the next seed"""
    out: str | None = None
    """folder of all runs (default: runs/compare-DATA-MODEL)"""

    @property
    def home(self) -> Path:
        return Path(self.out or Path("runs", folder_name("compare", self.data, self.model)))

    @property
    def sweep(self) -> list[Settings]:
        """All rules with the first seed, then with the next, so that a sweep that is stopped can be compared."""
        shared = self.shared
        whole = replace(shared, add_beliefs=False, **{name: getattr(Settings, name) for name in CHANGES})
        return [
            replace(
                whole if rule in rules.WHOLE else shared,
                rule=rule,
                seed=seed,
                out=str(self.home / folder_name(rule, f"seed{seed}")),
            )
            for seed in range(self.seed, self.seed + self.seeds)
            for rule in listed(self.rules, flag="--rules")
        ]


def main(args: Sequence[str]) -> None:
    unhelped = [arg for arg in args if arg not in ("-h", "--help")]
    data = parse(Options, unhelped, prog="bll compare", default=_default("digits")).data
    options = parse(Options, args, prog="bll compare", default=_default(data))
    lay_side_by_side(options.sweep, folder=options.home, title=f"{last_name(options.data)}, {last_name(options.model)}")


def _default(data: str) -> Options:
    return Options(**asdict(recipe(data)))
