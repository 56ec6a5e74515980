"""What `bll train DATA` does: as its options say, and where no option says otherwise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from blocklocal.lab import models
from blocklocal.lab.arguments import parse
from blocklocal.lab.errors import UserError
from blocklocal.lab.runs.folder import Run
from blocklocal.lab.settings import Settings
from blocklocal.lab.training import rules

DIGITS = Settings(threads=1)  # on images of 8x8 pixels threads wait for each other more than they compute

IMAGES = Settings(
    model="resnet18",
    epochs=30,
    batch_size=128,
    lr=0.1,
    weight_decay=5e-4,
    warmup=1.0,
    flip=True,
    crop=4,
)


def recipe(data: str) -> Settings:
    """The recipe for a data set, by its name on the command line."""
    return replace(DIGITS if data == "digits" else IMAGES, data=data)


def settings_from(args: Sequence[str]) -> Settings:
    """What is not given comes from the recipe of the data set, or from the run that is resumed.

    UserError: unusable arguments, or such as contradict the run that is resumed.
    """
    data = parse(Settings, [arg for arg in args if arg not in ("-h", "--help")], prog="bll train", default=DIGITS).data
    settings = parse(Settings, args, prog="bll train", default=recipe(data))
    if not settings.resume:
        return settings
    stored = replace(Run(settings.folder).settings(), out=settings.out, resume=True, trust=settings.trust)
    if not settings.trust:
        refuse_code(stored, run=settings.folder, repeated=settings)
    given = parse(Settings, args, prog="bll train", default=stored)
    changed = stored.contradictions(given)
    if changed:
        raise UserError(
            f"{', '.join(changed)} differs from the run in {str(settings.folder)!r}: "
            "resume it with its own settings, or begin another run in another --out"
        )
    return given


def refuse_code(stored: Settings, *, run: Path, repeated: Settings | None = None) -> None:
    """UserError: the model or the rule that a run names is a function, so that any code might be run.

    repeated: settings in which the same name shows that whoever calls the command knows it.
    """
    for kind, is_own in (("model", models.is_own), ("rule", rules.is_own)):
        name = getattr(stored, kind)
        if is_own(name) and (repeated is None or getattr(repeated, kind) != name):
            remedy = "add --trust" if repeated is None else f"repeat --{kind} {name} or add --trust"
            raise UserError(
                f"the run in {str(run)!r} has the {kind} {name!r}, whose code would be run: {remedy} if you know it"
            )
