"""The settings of a training run; `recipes` says what they are for a data set where no option says otherwise."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import Positional, arg

from blocklocal.lab import ranges
from blocklocal.lab.errors import UserError
from blocklocal.lab.groups import Group
from blocklocal.lab.ranges import Needs, Range

THREADS = 1024  # far more than help, far fewer than a system refuses
LONGEST_TIMEOUT = 10**7  # seconds: four months

DATA = Group("data")
MODEL = Group("model and rule")
OPTIMISATION = Group("optimisation")
EXECUTION = Group("execution")
OUTPUT = Group("output")


@dataclass(frozen=True)
class Settings:
    """Train a network on images, in blocks with local losses or whole, and keep everything in one folder."""

    data: Annotated[Positional[str], arg(metavar="DATA")] = "digits"
    """digits, fashion_mnist, cifar10, cifar100, hf:OWNER/NAME, or a folder of Parquet files or of images"""
    train_size: Annotated[int, DATA, Range(least=0)] = 0
    """train on a sample of so many images, always the same; 0: on all"""
    test_size: Annotated[int, DATA, Range(least=0)] = 0
    """test on such a sample; 0: on all"""
    validation: Annotated[int, DATA, Range(least=0)] = 0
    """hold so many training images out: on them exits are weighed, and settings compared"""
    flip: Annotated[bool, DATA] = False
    """mirror every second training image"""
    crop: Annotated[int, DATA, Range(least=0)] = 1
    """shift training images by up to so many pixels"""
    cutout: Annotated[int, DATA, Range(least=0)] = 0
    """blank a square of so many pixels in every training image"""
    model: Annotated[str, MODEL] = "cnn"
    """mlp, cnn, vgg8, vit, resnet8/18/20/32/34/50/56/110, timm:NAME, torchvision:NAME or package.module:function"""
    blocks: Annotated[int, MODEL, Range(least=1), Needs("at", ((),))] = 4
    """number of blocks"""
    at: Annotated[tuple[str, ...], MODEL] = ()
    """submodules after which to cut, instead of --blocks"""
    rule: Annotated[str, MODEL] = "bll"
    """in blocks: bll, bll-paper, pred, predsim or package.module:function; whole: bp (backprop), fa, usf, brsf,
    frsf, dfa, drtp"""
    head: Annotated[str | None, MODEL] = None
    """what predicts at borders, instead of the rule's own: linear, normalised, mlp, conv, residual, pooled,
    patches, depthwise, evidence"""
    budget: Annotated[float | None, MODEL, Range(above=0), Needs("head", (None,)), Needs("lookahead", ("none",))] = None
    """the best head of at most so many times its own block's operations, instead of the rule's own: 0.1"""
    lookahead: Annotated[Literal["none", "frozen", "trained", "both"], MODEL] = "none"
    """head behind a copy of the next unit: frozen and refreshed, learning with the block, or the mean of both; over
    processes every refresh is a message against the stream"""
    refresh: Annotated[int, MODEL, Range(least=1), Needs("lookahead", ("frozen", "both"))] = 100
    """steps between two refreshes of a frozen copy"""
    statistic: Annotated[Literal["mean", "moments", "grid"], MODEL] = "mean"
    """what a border reads of a channel: its mean over positions, with the deviation too, or the means of four quarters
    of a feature map"""
    variational: Annotated[float | None, MODEL, Range(least=0)] = None
    """weight of the variational term, instead of the rule's own; 0: without it"""
    estimate_variance: Annotated[bool, MODEL] = False
    """variational term with the variance of each channel estimated from the batch"""
    softness: Annotated[float, MODEL, Range(least=0, most=1)] = 0.0
    """share of the target spread over all classes at the first border, falling to none at the end"""
    power: Annotated[float, MODEL, Range(least=0, most=1)] = 1.0
    """with --add-beliefs and --softness: of the targets in the posterior, which has the rest from the belief"""
    add_beliefs: Annotated[bool, MODEL] = False
    """every exit adds its logits to those of the exits before it; what was trained is the model with its heads"""
    epochs: Annotated[int, OPTIMISATION, Range(least=1)] = 15
    """passes over the training images"""
    batch_size: Annotated[int, OPTIMISATION, Range(least=2)] = 64
    """images per step"""
    accumulate: Annotated[int, OPTIMISATION, Range(least=1)] = 1
    """number of minibatches whose mean gradient makes an optimizer step"""
    lr: Annotated[float, OPTIMISATION, Range(above=0, most=1e30)] = 0.1
    """highest learning rate"""
    momentum: Annotated[float, OPTIMISATION, Range(above=0, below=1)] = 0.9
    """momentum, Nesterov's"""
    weight_decay: Annotated[float, OPTIMISATION, Range(least=0, most=1e30)] = 5e-4
    """weight decay of all parameters"""
    clip: Annotated[float, OPTIMISATION, Range(least=0)] = 0.0
    """highest norm of the gradient of a block with its border; 0: no limit"""
    schedule: Annotated[Literal["cosine", "onecycle", "constant"], OPTIMISATION] = "cosine"
    """learning rate schedule: a fall to zero after the warm-up, or a rise for 30 % of the steps and a fall"""
    warmup: Annotated[float, OPTIMISATION, Range(least=0), Needs("schedule", ("cosine", "constant"))] = 1.0
    """epochs of linear rise before cosine or constant"""
    label_smoothing: Annotated[float, OPTIMISATION, Range(least=0, below=1)] = 0.0
    """share of the target spread over all classes"""
    seed: Annotated[int, OPTIMISATION, Range(least=0, most=2**63 - 1)] = 0
    """of initial weights, order and augmentation"""
    dtype: Annotated[Literal["fp32", "bf16"], EXECUTION] = "fp32"
    """arithmetic of the forward pass"""
    channels_last: Annotated[bool, EXECUTION] = False
    """channels innermost in memory, which convolutions may like"""
    device: Annotated[str, EXECUTION] = "auto"
    """auto (a GPU if there is one), cpu, cuda, cuda:1, ..."""
    threads: Annotated[int, EXECUTION, Range(least=0, most=THREADS)] = 0
    """CPU threads; 0 leaves the choice to PyTorch"""
    compile: Annotated[bool, EXECUTION] = False
    """compile every block with torch.compile"""
    replicas: Annotated[int, EXECUTION, Range(least=1)] = 1
    """over processes: copies of every block, each of which learns from its share of a minibatch"""
    shard: Annotated[bool, EXECUTION, Needs("replicas")] = False
    """with --replicas: each copy keeps a share of the block's weights and optimizer state (FSDP2)"""
    message_dtype: Annotated[Literal["fp32", "bf16"], EXECUTION] = "fp32"
    """over processes: what travels from block to block"""
    timeout: Annotated[float, EXECUTION, Range(above=0, most=LONGEST_TIMEOUT)] = 300.0
    """over processes: seconds without an answer after which another one is given up"""
    out: Annotated[str | None, OUTPUT] = None
    """folder of the run (default: runs/DATA-MODEL-RULE-seedN)"""
    save_every: Annotated[int, OUTPUT, Range(least=1)] = 500
    """minibatches between two checkpoints, besides those at the end of every epoch"""
    trace: Annotated[bool, OUTPUT] = False
    """over processes: record what each does when, for bll timeline"""
    resume: Annotated[bool, OUTPUT] = False
    """go on from the last checkpoint in --out, with the settings kept there"""
    trust: Annotated[bool, OUTPUT] = False
    """with --resume: run the code of the model package.module:function that is kept there (or repeat --model)"""

    def check(self) -> None:
        """UserError: a number out of its range, or options that do not go together."""
        ranges.check(self)
        if self.warmup > self.epochs:
            raise UserError(f"--warmup {self.warmup} is out of range: 0 to --epochs {self.epochs}")
        if self.batch_size % self.replicas:
            raise UserError(f"--replicas {self.replicas} is not a divisor of --batch-size {self.batch_size}")
        if self.shard and self.lookahead != "none":
            raise UserError(
                f"--shard leaves no unit whole that --lookahead {self.lookahead} could copy: leave one of them out"
            )
        if len(set(self.at)) < len(self.at):
            raise UserError(f"--at {' '.join(self.at)} names a submodule twice")

    def check_alone(self) -> None:
        """UserError: what only processes can do."""
        for name in OVER_PROCESSES:
            if getattr(self, name) != getattr(Settings, name):
                raise UserError(
                    f"{flag(name)} is for blocks over processes: start with bll launch, be it --processes 1"
                )

    @property
    def shared(self) -> Settings:
        """These settings without what a command of several runs adds to them."""
        return Settings(**{field.name: getattr(self, field.name) for field in fields(Settings)})

    @property
    def folder(self) -> Path:
        """Where the run is kept."""
        if self.out is not None:
            return Path(self.out)
        return Path("runs", folder_name(self.data, self.model, self.rule, f"seed{self.seed}"))

    def contradictions(self, other: Settings) -> list[str]:
        """The settings, as flags, in which `other` would be another run."""
        names = [field.name for field in fields(self) if field.name not in NOT_STORED]
        return [flag(name) for name in names if getattr(self, name) != getattr(other, name)]


# Of a rule's own local loss, see `rules.Changes`.
CHANGES = (
    "head",
    "budget",
    "lookahead",
    "refresh",
    "statistic",
    "variational",
    "estimate_variance",
    "softness",
    "power",
)
OVER_PROCESSES = ("trace", "message_dtype", "replicas", "timeout")  # and with replicas, shard

# They say where a run is, how it was called and watched, not what it computes.
NOT_STORED = ("out", "resume", "trust", "save_every", "timeout", "trace")

LONGEST = 60  # characters of a name in the name of a folder


def last_name(name: str) -> str:
    """What stands at the end of a path, a hub name or package.module:function."""
    return name.rstrip("/").rpartition("/")[2].rpartition(":")[2]


def folder_name(*names: str) -> str:
    """The name of a folder, put together from names of things: it leads nowhere else, and a file system can take it."""
    return "-".join(re.sub(r"[^\w.+-]", "_", last_name(name))[:LONGEST] for name in names)


def flag(name: str) -> str:
    """The field `batch_size` as it is called on the command line."""
    return "DATA" if name == "data" else f"--{name.replace('_', '-')}"


def encode(settings: Settings) -> dict[str, Any]:
    """For config.json: what a run computes."""
    return {name: value for name, value in asdict(settings).items() if name not in NOT_STORED}
