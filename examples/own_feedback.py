"""Your own feedback in the variational term, on 8x8 digits.

Run: python examples/own_feedback.py  (needs scikit-learn for the data; seconds on a CPU)
"""

from dataclasses import dataclass

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import blocklocal as bll


@dataclass(frozen=True)
class ClassMeans(bll.Feedback):
    """Feedback: settings that build the module of one border."""

    def build(self, targets: bll.Targets, *, channels: int) -> nn.Module:
        return ClassMeansFeedback(targets.size, channels)


class ClassMeansFeedback(nn.Module):
    """beta is the running mean of alpha over the samples of a class; `fit` is called with every training batch."""

    def __init__(self, classes: int, channels: int) -> None:
        super().__init__()
        self.means = nn.Buffer(torch.zeros(classes, channels))

    def forward(self, y: Tensor) -> Tensor:
        return self.means[y]

    def fit(self, y: Tensor, alpha: Tensor) -> None:
        for c in y.unique():
            self.means[c] = self.means[c].lerp(alpha[y == c].mean(0), 0.5)


def main(*, epochs: int = 10) -> float:
    torch.manual_seed(0)
    x, y = (torch.tensor(part) for part in load_digits(return_X_y=True))
    x, order = x.float() / 16, torch.randperm(len(x))
    blocks = [nn.Sequential(nn.Linear(64 if k == 0 else 128, 128), nn.ReLU()) for k in range(3)]
    loss = bll.Predictive() + 0.1 * bll.Variational()
    chain = [*blocks, nn.Linear(128, 10)]
    learner = bll.BlockLocal(chain, classes=10, example=x[:2], loss=loss, feedback=ClassMeans())
    optimizer = torch.optim.SGD(learner.parameters(), lr=0.05, momentum=0.9)
    for rows in epochs * order[:1437].split(64):
        learner.backward(x[rows], y[rows])
        optimizer.step()
        optimizer.zero_grad()
    return (learner.predict(x[order[1437:]]).argmax(1) == y[order[1437:]]).float().mean().item()


if __name__ == "__main__":
    print(f"test accuracy {main():.1%}")
