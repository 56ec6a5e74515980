"""The settings of a training run; `recipes` says what they are for a data set where no option says otherwise."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import Positional, arg

from blocklocal.lab.errors import UserError


@dataclass(frozen=True)
class Settings:
    """Train a network on images, in blocks with local losses or whole, and keep everything in one folder."""

    data: Annotated[Positional[str], arg(metavar="DATA")] = "digits"
    """digits, fashion_mnist, cifar10, cifar100, hf:OWNER/NAME, or a folder of Parquet files or of images"""
    model: str = "cnn"
    """mlp, cnn, vgg8, vit, resnet8/18/20/32/34/50/56/110, timm:NAME, torchvision:NAME or package.module:function"""
    rule: str = "bll"
    """in blocks: bll, bll-pooled, bll-paper, pred, predsim; whole: bp (backprop), fa, usf, brsf, frsf, dfa, drtp"""
    train_size: int = 0
    """train on a sample of so many images, always the same; 0: on all"""
    test_size: int = 0
    """test on such a sample; 0: on all"""
    blocks: int = 4
    """number of blocks"""
    at: tuple[str, ...] = ()
    """submodules after which to cut, instead of --blocks"""
    epochs: int = 15
    """passes over the training images"""
    batch_size: int = 64
    """images per step"""
    accumulate: int = 1
    """number of minibatches whose mean gradient makes an optimizer step"""
    lr: float = 0.1
    """highest learning rate"""
    momentum: float = 0.9
    """momentum, Nesterov's"""
    weight_decay: float = 5e-4
    """weight decay of all parameters"""
    clip: float = 0.0
    """highest norm of the gradient of a block with its border; 0: no limit"""
    schedule: Literal["cosine", "onecycle", "constant"] = "cosine"
    """course of the learning rate: a fall to zero after the warm-up, or a rise for 30 % of the steps and a fall"""
    warmup: float = 1.0
    """epochs of linear rise before cosine or constant"""
    label_smoothing: float = 0.0
    """share of the target spread over all classes"""
    flip: bool = False
    """mirror every second training image"""
    crop: int = 1
    """shift training images by up to so many pixels"""
    cutout: int = 0
    """blank a square of so many pixels in every training image"""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """arithmetic of the forward pass"""
    channels_last: bool = False
    """channels innermost in memory, which convolutions may like"""
    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda, cuda:1, ..."""
    compile: bool = False
    """compile every block with torch.compile"""
    threads: int = 0
    """CPU threads; 0 leaves the choice to PyTorch"""
    replicas: int = 1
    """over processes: copies of every block, each of which learns from its share of a minibatch"""
    shard: bool = False
    """with --replicas: each copy keeps a share of the block's weights and optimizer state (FSDP2)"""
    message: Literal["fp32", "bf16"] = "fp32"
    """over processes: what travels from block to block"""
    seed: int = 0
    """of initial weights, order and augmentation"""
    save_every: int = 500
    """minibatches between two checkpoints, besides those at the end of every epoch"""
    patience: float = 300.0
    """over processes: seconds without an answer after which another one is given up"""
    trace: bool = False
    """over processes: record what each does when, for bll timeline"""
    out: str | None = None
    """folder of the run (default: runs/DATA-MODEL-RULE-seedN)"""
    resume: bool = False
    """go on from the last checkpoint in --out, with the settings kept there"""

    def check(self) -> None:
        """UserError: a number out of its range."""
        allowed = {
            "train_size": (self.train_size >= 0, "0 or more"),
            "test_size": (self.test_size >= 0, "0 or more"),
            "blocks": (self.blocks >= 1, "1 or more"),
            "epochs": (self.epochs >= 1, "1 or more"),
            "batch_size": (self.batch_size >= 2, "2 or more"),
            "accumulate": (self.accumulate >= 1, "1 or more"),
            "clip": (0 <= self.clip < float("inf"), "0 or more"),
            "lr": (0 < self.lr < float("inf"), "more than 0"),
            "momentum": (0 < self.momentum < 1, "between 0 and 1"),
            "weight_decay": (0 <= self.weight_decay < float("inf"), "0 or more"),
            "warmup": (0 <= self.warmup <= self.epochs, "from 0 to --epochs"),
            "label_smoothing": (0 <= self.label_smoothing < 1, "from 0 to below 1"),
            "crop": (self.crop >= 0, "0 or more pixels"),
            "cutout": (self.cutout >= 0, "0 or more pixels"),
            "threads": (self.threads >= 0, "0 or more"),
            "seed": (0 <= self.seed < 2**63, "0 or more"),
            "replicas": (
                self.replicas >= 1 and self.batch_size % max(self.replicas, 1) == 0,
                f"1 or more, and a divisor of --batch-size {self.batch_size}",
            ),
            "save_every": (self.save_every >= 1, "1 or more"),
            "patience": (0 < self.patience < float("inf"), "more than 0"),
        }
        for name, (fine, what) in allowed.items():
            if not fine:
                raise UserError(f"{flag(name)} {getattr(self, name)} is out of range: {what}")
        if self.shard and self.replicas == 1:
            raise UserError("--shard spreads a block over its replicas: add --replicas, from 2 on")

    @property
    def folder(self) -> Path:
        """Where the run is kept."""
        if self.out is not None:
            return Path(self.out)
        names = [last_name(name) for name in (self.data, self.model)]
        return Path("runs", "-".join([*names, self.rule, f"seed{self.seed}"]))

    def contradictions(self, other: Settings) -> list[str]:
        """The settings, as flags, in which `other` would be another run."""
        names = [field.name for field in fields(self) if field.name not in PLACE]
        return [flag(name) for name in names if getattr(self, name) != getattr(other, name)]


# They say where a run is, how it was called and watched, not what it computes.
PLACE = ("out", "resume", "save_every", "patience", "trace")


def last_name(name: str) -> str:
    """What stands at the end of a path, a hub name or package.module:function."""
    return name.rstrip("/").rpartition("/")[2].rpartition(":")[2]


def flag(name: str) -> str:
    """The field `batch_size` as it is called on the command line."""
    return "DATA" if name == "data" else f"--{name.replace('_', '-')}"


def encode(settings: Settings) -> dict[str, Any]:
    """For config.json: what a run computes."""
    return {name: value for name, value in asdict(settings).items() if name not in PLACE}


def restore(stored: dict[str, Any]) -> Settings:
    """From config.json. TypeError, KeyError: settings of another version."""
    return Settings(**{**stored, "at": tuple(stored["at"])})
