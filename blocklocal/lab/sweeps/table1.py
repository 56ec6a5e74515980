"""The cells of the paper's Table 1, and smaller versions of them: each the settings of a run.

All rules and data sets use the same recipe: two cells of a scale differ only in the rule and the data.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from blocklocal.lab.settings import Settings

DATASETS = ("fashion_mnist", "cifar10", "cifar100")
RULES = ("bp", "fa", "predsim", "bll-paper", "bll")

# Test accuracy of ResNet-50, mean and standard deviation of three runs (paper, Table 1). The paper's BLL is listed for
# both of ours: bll-paper has its local loss, bll a deeper head.
PAPER = {
    ("fashion_mnist", "bp"): (0.934, 0.0060),
    ("fashion_mnist", "fa"): (0.866, 0.0070),
    ("fashion_mnist", "predsim"): (0.942, 0.0020),
    ("fashion_mnist", "bll-paper"): (0.941, 0.0024),
    ("fashion_mnist", "bll"): (0.941, 0.0024),
    ("cifar10", "bp"): (0.948, 0.0025),
    ("cifar10", "fa"): (0.625, 0.0040),
    ("cifar10", "predsim"): (0.921, 0.0020),
    ("cifar10", "bll-paper"): (0.946, 0.0017),
    ("cifar10", "bll"): (0.946, 0.0017),
    ("cifar100", "bp"): (0.778, 0.0021),
    ("cifar100", "predsim"): (0.717, 0.0076),
    ("cifar100", "bll-paper"): (0.779, 0.0010),
    ("cifar100", "bll"): (0.779, 0.0010),
}


# Shared by all scales: SGD with Nesterov momentum, mirrored images.
SHARED = Settings(lr=0.1, momentum=0.9, weight_decay=5e-4, flip=True, channels_last=True, threads=0)


def paper(data: str, *, rule: str) -> Settings:
    """ResNet-50 cut after every fourth bottleneck, 200 epochs; for a GPU."""
    return replace(
        SHARED,
        data=data,
        model="resnet50",
        rule=rule,
        at=("layer2.0", "layer3.0", "layer3.4"),
        epochs=200,
        batch_size=128,
        schedule="cosine",
        warmup=5.0,
        crop=4,
        dtype="bf16",
    )


def small(data: str, *, rule: str) -> Settings:
    """ResNet-20 cut after every second of its nine residual units, all images, five epochs."""
    return replace(
        SHARED,
        data=data,
        model="resnet20",
        rule=rule,
        at=("layer1.1", "layer2.0", "layer2.2"),
        epochs=5,
        batch_size=128,
        schedule="onecycle",
        crop=2,
    )


def tiny(data: str, *, rule: str) -> Settings:
    """ResNet-8 cut after its stem and every residual unit, 3,000 images, four epochs; for two CPU cores."""
    return replace(
        SHARED,
        data=data,
        model="resnet8",
        rule=rule,
        at=("relu", "layer1", "layer2"),
        train_size=3000,
        test_size=2000,
        epochs=4,
        batch_size=64,
        schedule="onecycle",
        crop=2,
    )


SCALES: dict[str, Callable[..., Settings]] = {"paper": paper, "small": small, "tiny": tiny}
