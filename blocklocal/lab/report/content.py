"""The content of a report on runs, independent of its format."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from blocklocal.lab.errors import UserError
from blocklocal.lab.report.plots import Plot, choose_colours, compare_groups, show_group
from blocklocal.lab.report.seed_groups import Group, gather
from blocklocal.lab.report.table import Row, summarise
from blocklocal.lab.runs.history import History
from blocklocal.lab.settings import NOT_STORED


@dataclass(frozen=True)
class Section:
    """A heading with its plots."""

    title: str
    plots: tuple[Plot, ...]


@dataclass(frozen=True)
class ReportContent:
    """What a report shows. unfinished: the progress of unfinished runs. settings, versions: all values, by name."""

    title: str
    rows: tuple[Row, ...]
    sections: tuple[Section, ...]
    unfinished: tuple[str, ...]
    settings: dict[str, str]
    versions: dict[str, str]

    @property
    def plots(self) -> list[Plot]:
        return [plot for section in self.sections for plot in section.plots]


def compose(runs: Sequence[History]) -> ReportContent:
    """Compose a report on these runs. UserError: none of them has finished an epoch."""
    groups = gather(runs)
    runs = [run for group in groups for run in group.runs]
    begun = [group for group in groups if group.counted]
    if not begun:
        raise UserError("there is nothing to report yet: none of these runs has finished an epoch")
    colours = choose_colours(begun)
    subjects = list(dict.fromkeys(group.subject for group in begun))
    return ReportContent(
        title=f"{'; '.join(subjects)} ({len(runs)} run{'s' if len(runs) > 1 else ''})",
        rows=tuple(summarise(groups)),
        sections=tuple(section for subject in subjects for section in _sections(subject, begun, colours=colours)),
        unfinished=tuple(
            f"{run.path}: {len(run.records)} of {run.settings.epochs} epochs" for run in runs if not run.finished
        ),
        settings=_settings(runs),
        versions=_versions(runs),
    )


def _sections(subject: str, groups: Sequence[Group], *, colours: Mapping[str, str]) -> list[Section]:
    members = [group for group in groups if group.subject == subject]
    inside = [(group, tuple(show_group(group))) for group in members]
    return [
        Section(subject, tuple(compare_groups(members, colours=colours))),
        *(Section(f"{subject}: {group.label}", plots) for group, plots in inside if plots),
    ]


def _settings(runs: Sequence[History]) -> dict[str, str]:
    names = [field.name for field in fields(runs[0].settings) if field.name not in NOT_STORED]
    return {name.replace("_", " "): _distinct(getattr(run.settings, name) for run in runs) for name in names}


def _versions(runs: Sequence[History]) -> dict[str, str]:
    names = dict.fromkeys(name for run in runs for name in run.facts["versions"])
    versions = {name: _distinct(run.facts["versions"].get(name) for run in runs) for name in names}
    devices = _distinct(", ".join(f"{key} {value}" for key, value in run.facts["device"].items()) for run in runs)
    return versions | {"device": devices, "git commit": _distinct(run.facts["git"] for run in runs)}


def _distinct(values: Iterable[Any]) -> str:
    texts = dict.fromkeys(" ".join(value) if isinstance(value, tuple) else str(value) for value in values)
    return "; ".join(text or "–" for text in texts)
