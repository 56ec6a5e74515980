"""Groups runs that differ only in their seed."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from blocklocal.lab.errors import UserError
from blocklocal.lab.runs.history import History
from blocklocal.lab.settings import CHANGES, Settings, last_name
from blocklocal.lab.tasks.measure import Measure

# Settings in which a rule may differ from backpropagation with the same recipe.
RULE = ("rule", "blocks", "at", *CHANGES, "add_beliefs", "seed")


@dataclass(frozen=True)
class Group:
    """The runs of one table row and one curve.

    variant: the settings that distinguish it from other groups of the same data, model and rule, such as "blocks 8".
    """

    runs: tuple[History, ...]
    variant: str = ""

    @property
    def settings(self) -> Settings:
        """The settings of the first run; the others differ in the seed."""
        return self.runs[0].settings

    @property
    def dataset(self) -> str:
        return last_name(self.settings.data)

    @property
    def subject(self) -> str:
        """Data set and model: groups with the same subject are compared."""
        return f"{self.dataset}, {last_name(self.settings.model)}"

    @property
    def label(self) -> str:
        return f"{self.settings.rule}, {self.variant}" if self.variant else self.settings.rule

    @property
    def counted(self) -> tuple[History, ...]:
        """The finished runs, or if there are none, those with at least one epoch."""
        finished = tuple(run for run in self.runs if run.finished)
        return finished or tuple(run for run in self.runs if run.records)

    @property
    def blocks(self) -> int:
        """The number of blocks, for a group that has finished an epoch."""
        return len(self.counted[0].records[0]["train_loss"])

    @property
    def measures(self) -> tuple[Measure, ...]:
        """What is shown of its tests."""
        return self.runs[0].measures

    def matches(self, other: Group) -> bool:
        """Whether only the rule differs, and where the model is cut."""
        return _without(self.settings, RULE) == _without(other.settings, RULE)


def gather(runs: Sequence[History]) -> list[Group]:
    """The groups, in the order of their first runs. Warns of a run that is left out, see `_one`."""
    found: dict[tuple[Any, ...], dict[int, list[History]]] = {}
    for run in runs:
        key = (*_without(run.settings, ("seed",)).items(), "merged" in run.facts, run.measures)
        seeds = found.setdefault(key, {})
        seeds.setdefault(run.settings.seed, []).append(run)
    groups = [Group(tuple(map(_one, seeds.values()))) for seeds in found.values()]
    for group in groups:
        _refuse_unlike(group)
    return [Group(group.runs, _variant(group, groups)) for group in groups]


def _one(runs: Sequence[History]) -> History:
    """Of runs with the same seed, which are one sample, the one that got furthest, or the latest of these."""
    chosen = max(runs, key=lambda run: (run.finished, len(run.records), run.changed))
    for run in runs:
        if run is not chosen:
            what = f"{str(run.path)!r} is left out: {str(chosen.path)!r} has the same settings and the same seed"
            warnings.warn(what, stacklevel=3)
    return chosen


def _refuse_unlike(group: Group) -> None:
    """Refuse runs with the same settings but different numbers of blocks, as from two versions of a model's code."""
    first, *others = group.runs
    for run in others:
        if run.facts["blocks"] != first.facts["blocks"]:
            raise UserError(
                f"{str(first.path)!r} and {str(run.path)!r} have the same settings, but {first.facts['blocks']} and "
                f"{run.facts['blocks']} blocks: report on only one of them"
            )


def _variant(group: Group, groups: Sequence[Group]) -> str:
    rivals = [
        other.settings
        for other in groups
        if (other.subject, other.settings.rule) == (group.subject, group.settings.rule)
    ]
    own = _without(group.settings, ("seed",))
    differing = [name for name in own if any(getattr(rival, name) != own[name] for rival in rivals)]
    in_turn = ["one block at a time"] if "merged" in group.runs[0].facts else []
    chosen = [name for name in differing if own[name] not in (None, ())]
    return ", ".join([*in_turn, *(f"{name.replace('_', ' ')} {_written(own[name])}" for name in chosen)])


def _written(value: Any) -> str:
    """As on the command line."""
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _without(settings: Settings, left_out: Sequence[str]) -> Mapping[str, Any]:
    place = ("out", "resume", *left_out)
    return {field.name: getattr(settings, field.name) for field in fields(settings) if field.name not in place}
