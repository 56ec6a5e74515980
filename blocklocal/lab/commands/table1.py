"""`bll table1`: the rules of the paper's Table 1 on its data sets, at the paper's scale or a smaller one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

from blocklocal.lab.arguments import parse
from blocklocal.lab.ranges import Range
from blocklocal.lab.settings import Settings, folder_name
from blocklocal.lab.sweeps.comparison import lay_side_by_side, listed
from blocklocal.lab.sweeps.sweep import MOST_SEEDS
from blocklocal.lab.sweeps.table1 import DATASETS, PAPER, RULES, SCALES


@dataclass(frozen=True)
class Options:
    """Measure the paper's Table 1: every rule on every data set with several seeds, one run after another.

    The same command continues where it was stopped. The column "paper" has the paper's figures, for ResNet-50.
    """

    scale: Literal["paper", "small", "tiny"] = "tiny"
    """paper: ResNet-50, for a GPU; small: ResNet-20 on all images; tiny: ResNet-8, minutes on two CPU cores"""
    rules: str = ",".join(RULES)
    """rules, separated by commas"""
    datasets: str = ",".join(DATASETS)
    """data sets, separated by commas"""
    data: str | None = None
    """folder with one subfolder per data set (default: the Hugging Face hub)"""
    seeds: Annotated[int, Range(least=1, most=MOST_SEEDS)] = 3
    """runs of every cell, with seeds 0, 1, ..."""
    epochs: Annotated[int | None, Range(least=1)] = None
    """epochs of every run (default: those of the scale)"""
    out: str | None = None
    """folder of all runs (default: runs/table1-SCALE)"""

    @property
    def home(self) -> Path:
        return Path(self.out or f"runs/table1-{self.scale}")

    @property
    def sweep(self) -> list[Settings]:
        """All cells with the first seed, then with the next, so that a sweep that is stopped still gives a table."""
        return [
            self._run(dataset, rule=rule, seed=seed)
            for seed in range(self.seeds)
            for dataset in listed(self.datasets, flag="--datasets")
            for rule in listed(self.rules, flag="--rules")
        ]

    def _run(self, dataset: str, *, rule: str, seed: int) -> Settings:
        data = dataset if self.data is None else str(Path(self.data, dataset))
        cell = SCALES[self.scale](data, rule=rule)
        epochs = cell.epochs if self.epochs is None else self.epochs
        out = str(self.home / folder_name(dataset, rule, f"seed{seed}"))
        return replace(cell, epochs=epochs, warmup=min(cell.warmup, epochs), seed=seed, out=out)


def main(args: Sequence[str]) -> None:
    options = parse(Options, args, prog="bll table1")
    sweep = options.sweep
    title = f"Table 1, {options.scale}: {sweep[0].model}; the paper: resnet50"
    lay_side_by_side(sweep, folder=options.home, title=title, reference=PAPER)
