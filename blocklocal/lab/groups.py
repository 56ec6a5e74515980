"""Runs that differ in nothing but their seed belong together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from blocklocal.lab.config import Settings, last_name
from blocklocal.lab.history import History

# Where a rule may differ from backpropagation at the same recipe.
RULE = ("rule", "blocks", "at", "seed")


@dataclass(frozen=True)
class Group:
    """The runs of one row and one curve.

    variant: the settings in which it differs from other groups of the same data, model and rule, as "blocks 8".
    """

    runs: tuple[History, ...]
    variant: str = ""

    @property
    def settings(self) -> Settings:
        """Of the first run; the others differ in the seed."""
        return self.runs[0].settings

    @property
    def dataset(self) -> str:
        return last_name(self.settings.data)

    @property
    def subject(self) -> str:
        """What is learned by what: groups of one subject are compared."""
        return f"{self.dataset}, {last_name(self.settings.model)}"

    @property
    def label(self) -> str:
        return f"{self.settings.rule}, {self.variant}" if self.variant else self.settings.rule

    @property
    def counted(self) -> tuple[History, ...]:
        """The finished runs, and where none is, those that have begun."""
        finished = tuple(run for run in self.runs if run.finished)
        return finished or tuple(run for run in self.runs if run.records)

    @property
    def blocks(self) -> int:
        """Of a group in which an epoch is done."""
        return len(self.counted[0].records[0]["test_accuracy"])

    def matches(self, other: Group) -> bool:
        """Whether only the rule differs, and with it where the model is cut."""
        return _without(self.settings, RULE) == _without(other.settings, RULE)


def gather(runs: Sequence[History]) -> list[Group]:
    """The groups, in the order in which their first runs are given."""
    found: dict[tuple[Any, ...], list[History]] = {}
    for run in runs:
        found.setdefault(tuple(_without(run.settings, ("seed",)).items()), []).append(run)
    groups = [Group(tuple(members)) for members in found.values()]
    return [Group(group.runs, _variant(group, groups)) for group in groups]


def _variant(group: Group, groups: Sequence[Group]) -> str:
    rivals = [
        other.settings
        for other in groups
        if (other.subject, other.settings.rule) == (group.subject, group.settings.rule)
    ]
    own = _without(group.settings, ("seed",))
    differing = [name for name in own if any(getattr(rival, name) != own[name] for rival in rivals)]
    return ", ".join(f"{name.replace('_', ' ')} {own[name]}" for name in differing)


def _without(settings: Settings, left_out: Sequence[str]) -> Mapping[str, Any]:
    place = ("out", "resume", *left_out)
    return {field.name: getattr(settings, field.name) for field in fields(settings) if field.name not in place}
