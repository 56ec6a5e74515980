"""A network, a batch and the rules that the tests of feedback alignment share."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from blocklocal.alignment import (
    Alignment,
    DirectFeedbackAlignment,
    DirectRandomTargetProjection,
    FeedbackAlignment,
    SignSymmetry,
)

RULES = {
    "fa": lambda model, example, seed: FeedbackAlignment(model, seed=seed),
    "usf": lambda model, example, seed: SignSymmetry(model, magnitude="uniform", seed=seed),
    "frsf": lambda model, example, seed: SignSymmetry(model, magnitude="fixed", seed=seed),
    "brsf": lambda model, example, seed: SignSymmetry(model, magnitude="batchwise", seed=seed),
    "dfa": lambda model, example, seed: DirectFeedbackAlignment(model, example=example, seed=seed),
    "drtp": lambda model, example, seed: DirectRandomTargetProjection(model, example=example, seed=seed),
}


class Residual(nn.Module):
    """A residual network: normalisation, in-place activations, grouped and strided convolutions, branches."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 3, padding=1)
        self.first = nn.Conv2d(channels, channels, 3, padding="same", groups=2, bias=False)
        self.norm = nn.BatchNorm2d(channels)
        self.second = nn.Conv2d(channels, channels, 3, stride=2, padding=1)
        self.shortcut = nn.Conv2d(channels, channels, 1, stride=2)
        self.classifier = nn.Linear(channels, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.stem(x), inplace=True)
        h = self.shortcut(h) + self.second(F.relu(self.norm(self.first(h))))
        return self.classifier(F.relu(h, inplace=True).mean((2, 3)))


def batch(n: int = 6, *, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return torch.randn(n, 3, 6, 6, dtype=dtype), torch.arange(n) % 4


def gradients(model: nn.Module, x: Tensor, y: Tensor, rule: Alignment | None = None) -> dict[str, Tensor]:
    """Of all parameters, by the rule's own backward or by the usual one."""
    model.zero_grad()
    if rule is None:
        F.cross_entropy(model(x), y).backward()
    else:
        rule.backward(x, y)
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
