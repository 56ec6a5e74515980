"""What `bll train DATA` does where no option says otherwise."""

from __future__ import annotations

from dataclasses import replace

from blocklocal.lab.config import Settings

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
