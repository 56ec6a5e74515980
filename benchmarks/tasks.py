"""Tasks other than the classification of images, each by backpropagation and in blocks, on data of scikit-learn.

    python benchmarks/tasks.py [--seeds 3] [--epochs 30]

- regression: a measure of disease progression of 442 diabetes patients from ten numbers; R^2 on a fifth of them.
- several labels: of 1,797 digits, whether each is even, more than four, a prime; share of right answers.
- a label per pixel: two digits on a canvas of 8x20, digit or background; share of right pixels, averaged over classes.
- a 1-d signal: a digit's 64 pixels one after another; accuracy.

The labels per pixel show `output=`, which brings a model's (B, n, H, W) to (B, H, W, n), and `ignore_index=`: dim
pixels are left out. They are learnt once more with heads that look through a copy of the layers that follow.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from sklearn.datasets import load_diabetes, load_digits
from torch import Tensor, nn
from torch.nn import functional as F

import blocklocal as bll

UNSURE, BACKGROUND = -100, 10


@dataclass(frozen=True)
class Task:
    """grade: from predictions and targets of the test samples. settings: those of the learner, a `Hooked` or other."""

    name: str
    x: Tensor
    y: Tensor
    model: Callable[[], nn.Sequential]
    grade: Callable[[Tensor, Tensor], float]
    settings: dict[str, Any] = field(default_factory=dict)
    learner: Callable[..., bll.BlockLocal | bll.Hooked] = bll.Hooked


def digits() -> tuple[Tensor, Tensor]:
    images, labels = load_digits(return_X_y=True)
    return torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16, torch.tensor(labels)


def regression() -> Task:
    x, y = (torch.tensor(part, dtype=torch.float32) for part in load_diabetes(return_X_y=True))
    x, y = x / x.std(0), (y - y.mean()) / y.std()

    def model() -> nn.Sequential:
        return nn.Sequential(nn.Linear(10, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1))

    def grade(prediction: Tensor, y: Tensor) -> float:
        return 1 - ((prediction - y).square().mean() / y.var(correction=0)).item()

    settings = {"outputs": 1, "criterion": F.mse_loss, "at": ["1"]}
    return Task("regression, R^2", x, y[:, None], model, grade, settings)


def several_labels() -> Task:
    x, labels = digits()
    y = torch.stack([labels % 2 == 0, labels > 4, torch.isin(labels, torch.tensor([2, 3, 5, 7]))], dim=1).float()
    settings = {"outputs": 3, "criterion": F.binary_cross_entropy_with_logits, "at": ["1", "3"]}

    def grade(prediction: Tensor, y: Tensor) -> float:
        return ((prediction > 0) == (y > 0.5)).float().mean().item()

    return Task("several labels, right answers", x, y, lambda: image_network(3), grade, settings)


def label_per_pixel() -> Task:
    images, labels = digits()
    left, right = torch.randperm(len(images), generator=torch.Generator().manual_seed(0)).view(-1)[:1796].view(2, -1)
    x = torch.zeros(len(left), 1, 8, 20)
    y = torch.full((len(left), 8, 20), BACKGROUND)
    for rows, columns in ((left, slice(1, 9)), (right, slice(11, 19))):
        x[..., columns] = images[rows]
        ink = images[rows, 0]
        known = torch.where(ink > 0.5, labels[rows, None, None], BACKGROUND)
        y[..., columns] = torch.where((ink > 0) & (ink <= 0.5), UNSURE, known)

    def model() -> nn.Sequential:
        layers: list[nn.Module] = []
        for inputs, dilation in ((1, 1), (24, 2), (24, 3)):
            layers += [nn.Conv2d(inputs, 24, 3, padding=dilation, dilation=dilation), nn.BatchNorm2d(24), nn.ReLU()]
        return nn.Sequential(*layers, nn.Conv2d(24, 11, 1))

    def grade(prediction: Tensor, y: Tensor) -> float:
        right = prediction.argmax(-1) == y
        return statistics.mean(right[y == c].float().mean().item() for c in range(11))

    settings = {
        "classes": 11,
        "ignore_index": UNSURE,
        "at": ["2", "5"],
        "output": lambda prediction: prediction.movedim(1, -1),
    }
    return Task("a label per pixel, right by class", x, y, model, grade, settings)


class ClassesLast(nn.Module):
    """(B, n, H, W) to (B, H, W, n)."""

    def forward(self, prediction: Tensor) -> Tensor:
        return prediction.movedim(1, -1)


def looking_ahead(task: Task) -> Task:
    """The same labels per pixel, with heads that look through a copy of the layers that follow, as `BlockLocal` has."""
    settings = {name: value for name, value in task.settings.items() if name != "output"}
    settings["loss"] = 0.1 * bll.Variational() + bll.Predictive(bll.Lookahead(refresh=None))
    return replace(
        task,
        name=f"{task.name}, looking ahead",
        model=lambda: nn.Sequential(*task.model(), ClassesLast()),
        settings=settings,
        learner=bll.BlockLocal,
    )


def signal() -> Task:
    images, labels = digits()

    def model() -> nn.Sequential:
        layers: list[nn.Module] = []
        for inputs in (1, 32, 32):
            layers += [nn.Conv1d(inputs, 32, 7, stride=2, padding=3), nn.BatchNorm1d(32), nn.ReLU()]
        return nn.Sequential(*layers, nn.Flatten(), nn.Linear(32 * 8, 10))

    def grade(prediction: Tensor, y: Tensor) -> float:
        return (prediction.argmax(-1) == y).float().mean().item()

    settings = {"classes": 10, "at": ["2", "5"]}
    return Task("1-d signal, accuracy", images.flatten(2), labels, model, grade, settings)


def image_network(outputs: int) -> nn.Sequential:
    layers = [nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(512, outputs))


def score(task: Task, *, blocks: bool, seed: int, epochs: int) -> list[float]:
    """The grade of every exit, and last that of all combined, on the fifth of the samples that was held out."""
    torch.manual_seed(seed)
    order = torch.randperm(len(task.x), generator=torch.Generator().manual_seed(0))
    test, training = order.split([len(order) // 5, len(order) - len(order) // 5])
    settings = task.settings if blocks else {**task.settings, "at": []}
    learner = task.learner(task.model(), example=task.x[:8], **settings)
    optimizer = torch.optim.AdamW(learner.parameters(), lr=3e-3)
    steps = epochs * (len(training) // 32)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps)
    for _ in range(epochs):
        for rows in training[torch.randperm(len(training))].split(32)[: len(training) // 32]:
            learner.backward(task.x[rows], task.y[rows])
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    learner.eval()
    predictions = [*learner.exits(task.x[test]), learner.predict(task.x[test], exit="all")]
    return [task.grade(prediction, task.y[test]) for prediction in predictions]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=30)
    options = parser.parse_args()
    torch.set_num_threads(1)
    for task in (regression(), several_labels(), label_per_pixel(), looking_ahead(label_per_pixel()), signal()):
        for blocks in (False, True):
            scores = [score(task, blocks=blocks, seed=s, epochs=options.epochs) for s in range(options.seeds)]
            columns = list(zip(*scores, strict=True))
            names = [*(f"exit {k}" for k in range(len(columns) - 1)), "all"] if blocks else ["backprop"]
            shown = (
                f"{name} {statistics.mean(column):.3f} ± {statistics.stdev(column) if len(column) > 1 else 0:.3f}"
                for name, column in zip(names, columns, strict=False)
            )
            print(f"{task.name}: {', '.join(shown)}", flush=True)


if __name__ == "__main__":
    main()
