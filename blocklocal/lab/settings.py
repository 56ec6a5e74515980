"""The settings of a training run. Their defaults for each data set are in `recipes`."""

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

THREADS = 1024  # far more than are useful, far fewer than a system refuses
LONGEST_TIMEOUT = 10**7  # seconds: four months

ADAM = ("adamw", "schedulefree")

DATA = Group("data")
MODEL = Group("model and rule")
OPTIMISATION = Group("optimisation")
EXECUTION = Group("execution")
OUTPUT = Group("output")


@dataclass(frozen=True)
class Settings:
    """Train a network on images, text or a table, as a whole or in blocks with local losses, and keep everything in one
    folder.

    The defaults depend on the data: bll train DATA --help shows those for DATA. bll train --only K trains one block
    alone: see bll train --only 0 --help.
    """

    data: Annotated[Positional[str], arg(metavar="DATA")] = "digits"
    """images: digits, fashion_mnist, cifar10, cifar100, hf:OWNER/NAME, or a folder of Parquet files or of images; text:
    text:FILE; a table: table:FILE (CSV or Parquet), or table:iris, wine, breast_cancer or diabetes"""
    train_size: Annotated[int, DATA, Range(least=0)] = 0
    """number of samples (images, windows of text, rows) to train on, always the same; 0: all"""
    test_size: Annotated[int, DATA, Range(least=0)] = 0
    """number of samples to test on, always the same; 0: all"""
    validation: Annotated[int, DATA, Range(least=0)] = 0
    """number of training samples to hold out, for weighting the exits and comparing settings"""
    flip: Annotated[bool, DATA] = False
    """mirror training images with probability 1/2"""
    crop: Annotated[int, DATA, Range(least=0)] = 1
    """largest shift of a training image, in pixels"""
    cutout: Annotated[int, DATA, Range(least=0)] = 0
    """side of a square blanked in every training image, in pixels"""
    context: Annotated[int, DATA, Range(least=2, most=2**20)] = 64
    """text: number of tokens in a window, and the most that the model reads"""
    windows: Annotated[int, DATA, Range(least=0)] = 0
    """text: windows in an epoch, drawn anew from all places; 0: as many as the text holds"""
    vocabulary: Annotated[int, DATA, Range(least=0, most=2**20)] = 0
    """text: number of byte pairs to learn from the training part as tokens, more than 256; 0: each character is one"""
    target: Annotated[str | None, DATA] = None
    """table: the column to predict (default: the last one)"""
    target_type: Annotated[Literal["auto", "classes", "numbers"], DATA] = "auto"
    """table: what that column holds; auto: numbers if they have fractions or more than 20 different values, else
    classes"""
    model: Annotated[str, MODEL] = "cnn"
    """mlp, cnn, vgg8, vit, resnet8/18/20/32/34/50/56/110, timm:NAME, torchvision:NAME, hf:CONFIG (transformers: a
    folder, a JSON file or a kind such as vit) or package.module:function; for text gpt-tiny, gpt-small, gpt-medium,
    hf:CONFIG such as hf:gpt2 or package.module:function"""
    model_args: Annotated[tuple[str, ...], MODEL] = ()
    """more arguments of the function that makes the model, or fields of CONFIG: NAME=VALUE, such as img_size=32"""
    weights: Annotated[str | None, MODEL] = None
    """initial weights: a file with the model's state dict, .safetensors or of torch.save"""
    blocks: Annotated[int, MODEL, Range(least=1), Needs("at", ((),))] = 4
    """number of blocks"""
    at: Annotated[tuple[str, ...], MODEL] = ()
    """submodules to cut after, instead of --blocks"""
    rule: Annotated[str, MODEL] = "bll"
    """in blocks: bll, bll-paper, pred, predsim or package.module:function; as a whole: bp (backprop), fa, usf, brsf,
    frsf, dfa, drtp"""
    head: Annotated[str | None, MODEL] = None
    """prediction head at borders, instead of the rule's own: linear, normalised, mlp, conv, residual, pooled,
    patches, depthwise, evidence, or unembedding: a frozen copy of the model's output layer, refreshed"""
    budget: Annotated[float | None, MODEL, Range(above=0), Needs("head", (None,)), Needs("lookahead", ("none",))] = None
    """use the best head within this share of its block's operations, instead of the rule's own: 0.1"""
    lookahead: Annotated[Literal["none", "frozen", "trained", "both"], MODEL] = "none"
    """put the head behind a copy of the next unit: frozen and refreshed, trained with the block, or the mean of both;
    over processes every refresh is a message against the stream"""
    refresh: Annotated[
        int, MODEL, Range(least=1), Needs("lookahead", ("frozen", "both"), otherwise=Needs("head", ("unembedding",)))
    ] = 100
    """steps between refreshes of a frozen copy"""
    statistic: Annotated[Literal["mean", "moments", "grid"], MODEL] = "mean"
    """what a border reads from a channel: its mean over positions, mean and standard deviation, or the means of four
    quarters of a feature map"""
    variational: Annotated[float | None, MODEL, Range(least=0)] = None
    """weight of the variational term, instead of the rule's own; 0 removes it"""
    estimate_variance: Annotated[bool, MODEL] = False
    """estimate the variance of each channel in the variational term from the batch"""
    softness: Annotated[float, MODEL, Range(least=0, most=1)] = 0.0
    """share of the target spread over all classes at the first border, falling to 0 at the end of the network"""
    power: Annotated[float, MODEL, Range(least=0, most=1)] = 1.0
    """with --add-beliefs and --softness: power of the targets in the posterior; the rest goes to the belief"""
    add_beliefs: Annotated[bool, MODEL] = False
    """add the logits of every exit to those of the exits before it; the trained model then includes its heads"""
    epochs: Annotated[int, OPTIMISATION, Range(least=1)] = 15
    """passes over the training samples"""
    batch_size: Annotated[int, OPTIMISATION, Range(least=2)] = 64
    """samples per step"""
    accumulate: Annotated[int, OPTIMISATION, Range(least=1)] = 1
    """minibatches per optimizer step, which uses their mean gradient"""
    optimizer: Annotated[Literal["sgd", "adamw", "schedulefree"], OPTIMISATION] = "sgd"
    """SGD with Nesterov momentum, AdamW, or schedule-free AdamW, which needs --schedule constant"""
    lr: Annotated[float, OPTIMISATION, Range(above=0, most=1e30)] = 0.1
    """highest learning rate"""
    momentum: Annotated[float, OPTIMISATION, Range(above=0, below=1)] = 0.9
    """momentum of SGD, β₁ of AdamW"""
    beta2: Annotated[float, OPTIMISATION, Range(least=0, below=1), Needs("optimizer", ("adamw", "schedulefree"))] = (
        0.999
    )
    """β₂ of AdamW"""
    weight_decay: Annotated[float, OPTIMISATION, Range(least=0, most=1e30)] = 5e-4
    """weight decay: with SGD of all parameters, with AdamW of matrices and kernels only"""
    clip: Annotated[float, OPTIMISATION, Range(least=0)] = 0.0
    """largest gradient norm of a block with its border; 0: no limit"""
    schedule: Annotated[Literal["cosine", "onecycle", "constant"], OPTIMISATION] = "cosine"
    """learning rate schedule: cosine decay to zero after the warm-up, a rise for 30 % of the steps and then a fall, or
    constant after the warm-up"""
    warmup: Annotated[float, OPTIMISATION, Range(least=0), Needs("schedule", ("cosine", "constant"))] = 1.0
    """epochs of linear warm-up before cosine or constant"""
    label_smoothing: Annotated[float, OPTIMISATION, Range(least=0, below=1)] = 0.0
    """share of the target spread over all classes"""
    seed: Annotated[int, OPTIMISATION, Range(least=0, most=2**63 - 1)] = 0
    """seed of initial weights, order and augmentation"""
    dtype: Annotated[Literal["fp32", "bf16"], EXECUTION] = "fp32"
    """precision of the forward pass"""
    channels_last: Annotated[bool, EXECUTION] = False
    """store channels innermost in memory, which can speed up convolutions"""
    device: Annotated[str, EXECUTION] = "auto"
    """auto (a GPU if there is one), cpu, cuda, cuda:1, ..."""
    threads: Annotated[int, EXECUTION, Range(least=0, most=THREADS)] = 0
    """CPU threads; 0 leaves the choice to PyTorch"""
    compile: Annotated[bool, EXECUTION] = False
    """compile every block with torch.compile"""
    offload: Annotated[str, EXECUTION] = "none"
    """keep one block at a time on the device, with its optimizer state, and the others in host memory (cpu) or in files
    (disk, disk:FOLDER)"""
    replicas: Annotated[int, EXECUTION, Range(least=1)] = 1
    """over processes: copies of every block, each learning from its share of a minibatch"""
    shard: Annotated[bool, EXECUTION, Needs("replicas")] = False
    """with --replicas: each copy keeps a share of the block's weights and optimizer state (FSDP2)"""
    message_dtype: Annotated[Literal["fp32", "bf16"], EXECUTION] = "fp32"
    """over processes: precision of the messages between blocks"""
    timeout: Annotated[float, EXECUTION, Range(above=0, most=LONGEST_TIMEOUT)] = 300.0
    """over processes: seconds without an answer before a process is given up"""
    out: Annotated[str | None, OUTPUT] = None
    """folder of the run (default: runs/DATA-MODEL-RULE-seedN)"""
    save_every: Annotated[int, OUTPUT, Range(least=1)] = 500
    """minibatches between checkpoints; there is always one at the end of an epoch"""
    trace: Annotated[bool, OUTPUT] = False
    """over processes: record what each process does and when, for bll timeline"""
    tensorboard: Annotated[bool, OUTPUT] = False
    """write metrics.jsonl as event files for TensorBoard too, in the run's folder tensorboard"""
    resume: Annotated[bool, OUTPUT] = False
    """continue from the last checkpoint in --out, with the settings kept there"""
    trust: Annotated[bool, OUTPUT] = False
    """with --resume: run the code of the model package.module:function named there (or repeat --model)"""

    def check(self) -> None:
        """Check the values. UserError: a number is out of range, or options do not go together."""
        ranges.check(self)
        if self.warmup > self.epochs:
            raise UserError(f"--warmup {self.warmup} is out of range: 0 to --epochs {self.epochs}")
        if self.batch_size % self.replicas:
            raise UserError(f"--replicas {self.replicas} is not a divisor of --batch-size {self.batch_size}")
        if self.optimizer == "schedulefree" and self.schedule != "constant":
            raise UserError("--optimizer schedulefree lowers no rate: add --schedule constant")
        if self.optimizer == "schedulefree" and self.shard:
            raise UserError("--optimizer schedulefree is not for --shard: leave one of them out")
        for kind, names in OF_KIND.items():
            given = next((name for name in names if getattr(self, name) != getattr(Settings, name)), None)
            if given and kind != self.kind:
                raise UserError(f"{flag(given)} is for {NEEDED[kind]}, and DATA {self.data!r} is {NEEDED[self.kind]}")
        if self.shard and self.lookahead != "none":
            raise UserError(
                f"--shard leaves no whole unit for --lookahead {self.lookahead} to copy: leave one of them out"
            )
        if self.offload != "none":
            self._check_offload()
        if len(set(self.at)) < len(self.at):
            raise UserError(f"--at {' '.join(self.at)} names a submodule twice")

    def check_alone(self) -> None:
        """Check the settings of a run in one process. UserError: an option that needs several."""
        for name in OVER_PROCESSES:
            if getattr(self, name) != getattr(Settings, name):
                raise UserError(
                    f"{flag(name)} is for blocks over processes: start with bll launch, even for --processes 1"
                )

    def check_together(self) -> None:
        """Check the settings of a run over processes. UserError: an option that is for one process."""
        if self.offload != "none":
            raise UserError(
                "--offload is for a run in one process, and every process keeps its own blocks: leave it out"
            )
        if self.copies_output_layer:
            raise UserError(
                "--head unembedding copies the model's output layer, which another process may keep: choose another "
                "head"
            )

    def _check_offload(self) -> None:
        where, colon, folder = self.offload.partition(":")
        if where not in ("cpu", "disk") or (colon and (where == "cpu" or not folder)):
            raise UserError(f"--offload {self.offload!r} is unknown: choose none, cpu, disk or disk:FOLDER")
        for name in ("accumulate", "compile", "lookahead"):
            if getattr(self, name) != getattr(Settings, name):
                raise UserError(f"--offload keeps one block at a time in memory: leave it out, or {flag(name)}")
        if self.copies_output_layer:
            raise UserError("--offload keeps one block at a time in memory: leave it out, or --head unembedding")
        if self.optimizer == "schedulefree":
            raise UserError(
                "--offload keeps one block at a time in memory, which --optimizer schedulefree does not allow"
            )

    @property
    def copies_output_layer(self) -> bool:
        """Whether every border needs the last block's weights."""
        return self.head == "unembedding"

    @property
    def kind(self) -> str:
        """See `kind_of`."""
        return kind_of(self.data)

    @property
    def shared(self) -> Settings:
        """These settings without the options that a command for several runs adds."""
        return Settings(**{field.name: getattr(self, field.name) for field in fields(Settings)})

    @property
    def folder(self) -> Path:
        """The folder of the run."""
        if self.out is not None:
            return Path(self.out)
        return Path("runs", folder_name(self.data, self.model, self.rule, f"seed{self.seed}"))

    def contradictions(self, other: Settings) -> list[str]:
        """Flags of the settings that would make `other` a different run."""
        names = [field.name for field in fields(self) if field.name not in NOT_STORED]
        return [flag(name) for name in names if getattr(self, name) != getattr(other, name)]


# Changes to a rule's own local loss, see `rules.Changes`.
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
OVER_PROCESSES = ("trace", "message_dtype", "replicas", "timeout")  # and shard, which needs replicas

# Options that are for one kind of data.
OF_KIND = {
    "images": ("flip", "crop", "cutout", "channels_last"),
    "text": ("context", "windows", "vocabulary"),
    "table": ("target", "target_type"),
}
NEEDED = {"images": "images", "text": "text", "table": "a table"}

# Where a run is kept and how it is started and watched, not what it computes.
NOT_STORED = ("out", "resume", "trust", "save_every", "timeout", "trace", "tensorboard", "offload")

LONGEST = 60  # characters of one name within a folder name


def kind_of(data: str) -> str:
    """The kind of data of this name: text, table or images."""
    source, colon, _ = data.partition(":")
    return source if colon and source in NEEDED else "images"


def last_name(name: str) -> str:
    """The last part of a path, a hub name or package.module:function."""
    return name.rstrip("/").rpartition("/")[2].rpartition(":")[2]


def folder_name(*names: str) -> str:
    """A folder name made of other names, without path separators and short enough for a file system."""
    return "-".join(re.sub(r"[^\w.+-]", "_", last_name(name))[:LONGEST] for name in names)


def flag(name: str) -> str:
    """The name of a field on the command line: --batch-size for `batch_size`."""
    return "DATA" if name == "data" else f"--{name.replace('_', '-')}"


def encode(settings: Settings) -> dict[str, Any]:
    """The settings that config.json keeps: those that decide what a run computes."""
    return {name: value for name, value in asdict(settings).items() if name not in NOT_STORED}
