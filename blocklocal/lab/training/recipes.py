"""The settings of `bll train DATA`: the recipe of the data set, changed by the options."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from blocklocal.lab import models
from blocklocal.lab.arguments import parse
from blocklocal.lab.errors import UserError
from blocklocal.lab.runs.folder import Run
from blocklocal.lab.settings import Settings, kind_of
from blocklocal.lab.training import rules

DIGITS = Settings(threads=1)  # for images of 8x8 pixels threads spend more time waiting than computing

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

TEXT = Settings(
    model="gpt-small",
    epochs=4,
    windows=6000,
    batch_size=12,
    optimizer="adamw",
    lr=1e-3,
    beta2=0.99,
    weight_decay=0.1,
    clip=1.0,
    warmup=0.2,
    threads=1,  # windows of 64 characters are too small for more
)

TABLE = Settings(model="mlp", epochs=30, batch_size=32, optimizer="adamw", lr=1e-3, weight_decay=0.01, threads=1)

RECIPES = {"images": IMAGES, "text": TEXT, "table": TABLE}


def recipe(data: str) -> Settings:
    """The recipe for a data set, given by its name on the command line."""
    return replace(DIGITS if data == "digits" else RECIPES[kind_of(data)], data=data)


def settings_from(args: Sequence[str]) -> Settings:
    """The settings from the arguments, with the others from the recipe of the data set or from the run to resume.

    UserError: arguments that are unusable, or contradict the run to resume.
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
            "resume it with its own settings, or start another run in another --out"
        )
    return given


def refuse_code(stored: Settings, *, run: Path, repeated: Settings | None = None) -> None:
    """Refuse a run whose model or rule is a function, so that arbitrary code would be run.

    repeated: settings that give permission by naming the same function.
    """
    for kind, is_own in (("model", models.is_own), ("rule", rules.is_own)):
        name = getattr(stored, kind)
        if is_own(name) and (repeated is None or getattr(repeated, kind) != name):
            remedy = "add --trust" if repeated is None else f"repeat --{kind} {name} or add --trust"
            raise UserError(
                f"the run in {str(run)!r} has the {kind} {name!r}, whose code would be run: {remedy} if you trust it"
            )
