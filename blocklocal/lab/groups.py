"""Groups of options in the help of a command: `lr: Annotated[float, Group("optimisation")]`.

tyro prints a box for each nested dataclass. Settings are flat, as config.json is; only for the help are the fields of a
group nested, without a change to the names of the options.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Annotated, Any, ClassVar

from tyro.conf import arg
from tyro.constructors import (
    MISSING_NONPROP,
    ConstructorRegistry,
    StructConstructorSpec,
    StructFieldSpec,
    StructTypeInfo,
)

from blocklocal.lab import ranges


@dataclass(frozen=True)
class Group:
    """The group that an option belongs to in the help."""

    name: str


class _Grouped:
    """A dataclass of options with its groups nested, as tyro reads it."""

    kind: ClassVar[type]


class _Box:
    """The options of one group, as tyro reads them."""

    fields: ClassVar[tuple[StructFieldSpec, ...]]


@cache
def grouped(kind: type) -> type:
    """A class that tyro, with `struct_rule`, reads as this dataclass of options with its groups nested."""
    return type(kind.__name__, (_Grouped,), {"kind": kind})


def struct_rule(info: StructTypeInfo) -> StructConstructorSpec | None:
    """The rule by which tyro reads what `grouped` returns."""
    if not isinstance(info.type, type):
        return None
    if issubclass(info.type, _Box):
        return StructConstructorSpec(instantiate=dict, fields=info.type.fields)
    if not issubclass(info.type, _Grouped):
        return None
    kind = info.type.kind
    flat = ConstructorRegistry.get_struct_spec(StructTypeInfo.make(kind, info.default, in_union_context=False))
    assert isinstance(flat, StructConstructorSpec)
    ungrouped: list[StructFieldSpec] = []
    boxes: dict[str, list[StructFieldSpec]] = {}
    for field in flat.fields:
        field = replace(field, type=Annotated[field.type, arg(prefix_name=False)], helptext=_unbroken(field.helptext))
        group = group_of(kind, field.name)
        (ungrouped if group is None else boxes.setdefault(group.name, [])).append(field)

    def instantiate(**found: Any) -> Any:
        nested = [found.pop(_field(name)) for name in boxes]
        return flat.instantiate(**found, **{name: value for box in nested for name, value in box.items()})

    return StructConstructorSpec(instantiate, (*ungrouped, *(_box(name, fields) for name, fields in boxes.items())))


def group_of(kind: type, name: str) -> Group | None:
    """The group of a field of a dataclass of options."""
    return next((part for part in ranges.declared(kind)[name][1] if isinstance(part, Group)), None)


def _box(name: str, fields: list[StructFieldSpec]) -> StructFieldSpec:
    box: Any = Annotated[type(name, (_Box,), {"fields": tuple(fields)}), arg(name=name)]
    return StructFieldSpec(_field(name), box, default=MISSING_NONPROP, helptext="")


def _field(group: str) -> str:
    """The name of the field that holds a group; no option can have it."""
    return f"{group} options"


def _unbroken(text: str | Callable[[], str | None] | None) -> Callable[[], str | None]:
    """The text on one line, since tyro would break it where the source does."""

    def join() -> str | None:
        found = text() if callable(text) else text
        return None if found is None else " ".join(found.split())

    return join
