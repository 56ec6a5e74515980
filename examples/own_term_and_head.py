"""Your own loss term and head at the borders of a network, on 8x8 digits.

Run: python examples/own_term_and_head.py  (needs scikit-learn for the data; seconds on a CPU)
"""

from dataclasses import dataclass

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

import blocklocal as bll


@dataclass(frozen=True)
class Compactness(bll.Term):
    """A term: settings that build the module of one border."""

    def build(self, spec: bll.BorderSpec) -> nn.Module:
        return CompactnessTerm()


class CompactnessTerm(nn.Module):
    """The mean squared distance of alpha from the mean of its class in the batch."""

    def forward(self, border_input: bll.BorderInput, y: Tensor) -> Tensor:
        alpha, one_hot = border_input.alpha, F.one_hot(y).to(border_input.alpha)  # (B, C), (B, n)
        means = one_hot.T @ alpha / one_hot.sum(0)[:, None].clamp(min=1)
        return (alpha - means[y]).square().mean()


class CosineHead(nn.Module):
    """A head: any function of a BorderSpec that returns a module. Logits are scaled cosines with a vector per class."""

    def __init__(self, spec: bll.BorderSpec) -> None:
        super().__init__()
        self.classes = nn.Parameter(torch.randn(spec.targets.size, spec.statistics))

    def forward(self, border_input: bll.BorderInput) -> Tensor:
        return 16 * F.normalize(border_input.statistics, dim=-1) @ F.normalize(self.classes, dim=-1).T


def main(*, epochs: int = 10) -> float:
    torch.manual_seed(0)
    x, y = (torch.tensor(part) for part in load_digits(return_X_y=True))
    x, order = x.float() / 16, torch.randperm(len(x))
    blocks = [nn.Sequential(nn.Linear(64 if k == 0 else 128, 128), nn.ReLU()) for k in range(3)]
    loss = bll.Predictive(CosineHead) + 0.1 * Compactness()
    learner = bll.BlockLocal([*blocks, nn.Linear(128, 10)], classes=10, example=x[:2], loss=loss)
    optimizers = [torch.optim.SGD(learner.block_parameters(k), lr=0.05, momentum=0.9) for k in range(4)]
    for rows in epochs * order[:1437].split(64):
        learner.backward(x[rows], y[rows], optimizers=optimizers)
    return (learner.predict(x[order[1437:]]).argmax(1) == y[order[1437:]]).float().mean().item()


if __name__ == "__main__":
    print(f"test accuracy {main():.1%}")
