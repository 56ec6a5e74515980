"""Small models of the shapes that real ones have, each with a batch of its input; borders of any shape."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from blocklocal.feedback import Targets
from blocklocal.layout import Layout
from blocklocal.messages import BorderSpec, Criterion


class Residual(nn.Module):
    """Post-activation residual unit with in-place ReLU used twice."""

    def __init__(self, inputs: int, outputs: int, *, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride=stride) if stride > 1 or inputs != outputs else None

    def forward(self, x: Tensor) -> Tensor:
        h = self.relu(self.bn1(self.conv1(x)))
        skip = x if self.shortcut is None else self.shortcut(x)
        return self.relu(self.bn2(self.conv2(h)) + skip)


class PreActivation(nn.Module):
    """Pre-activation residual unit: it starts with an activation."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(channels), nn.Conv2d(channels, channels, 3, padding=1)
        self.bn2, self.conv2 = nn.BatchNorm2d(channels), nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.relu(self.bn1(x)))
        return x + self.conv2(F.relu(self.bn2(h)))


class Inception(nn.Module):
    """Three branches, concatenated."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.one = nn.Conv2d(inputs, 2, 1)
        self.three = nn.Sequential(nn.Conv2d(inputs, 3, 1), nn.ReLU(), nn.Conv2d(3, 3, 3, padding=1))
        self.pool = nn.Sequential(nn.MaxPool2d(3, 1, 1), nn.Conv2d(inputs, 3, 1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.one(x), self.three(x), self.pool(x)], 1)


class Images(nn.Module):
    """A stem, stages of the given units, and a classifier on the pooled map, written out in forward."""

    def __init__(self, *stages: nn.Module, channels: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8))
        self.stages = nn.ModuleList(stages)
        self.dropout = nn.Dropout(0.2)
        self.fc = nn.Linear(channels, 4)

    def forward(self, x: Tensor, scale: float = 1.0, mask: Tensor | None = None) -> Tensor:
        h = self.stem(x * scale if mask is None else x * mask)
        for stage in self.stages:
            h = stage(h)
        return self.fc(self.dropout(torch.flatten(F.adaptive_avg_pool2d(h, 1), 1)))


class Nested(nn.Module):
    """Containers in containers, a block of free functions between them, and a constant buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.scale: Tensor
        self.register_buffer("scale", torch.full((6,), 0.5), persistent=False)
        self.outer = nn.ModuleDict(
            {
                "a": nn.Sequential(nn.Linear(6, 6), nn.Sequential(nn.Tanh(), nn.Linear(6, 6)), nn.LayerNorm(6)),
                "b": nn.Sequential(nn.Sequential(nn.Sequential(nn.Linear(6, 8)), nn.GELU()), nn.Linear(8, 6)),
            }
        )
        self.last = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.outer["a"](x)
        return self.last(self.outer["b"](torch.sin(h) * self.scale) + 1)


class Branching(nn.Module):
    """A module whose course depends on its values: Python that cannot be traced."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.relu = nn.ReLU(inplace=True)
        self.a, self.b = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(x)
        return self.a(x) if x.sum() > 0 else self.b(x)


class Layer(nn.Module):
    """Pre-norm transformer layer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Dropout(0.1), nn.Linear(2 * width, width))

    def forward(self, h: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(h)).chunk(3, -1)
        h = h + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True))
        return h + self.mlp(self.norm2(h))


class Transformer(nn.Module):
    """Token ids (B, T) to logits per token (B, T, 4), or (B, 4) where pooled; positions are a parameter of its own."""

    def __init__(self, *, pooled: bool = False, width: int = 8) -> None:
        super().__init__()
        self.pooled = pooled
        self.embedding = nn.Embedding(11, width)
        self.positions = nn.Parameter(torch.randn(1, 5, width))
        self.shift: Tensor
        self.register_buffer("shift", torch.linspace(-1, 1, width))
        self.layers = nn.Sequential(Layer(width), Layer(width), Layer(width))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.norm(self.layers(self.embedding(tokens) + self.positions) + self.shift)
        return self.head(h.mean(1) if self.pooled else h)


def perceptron() -> tuple[nn.Module, Tensor]:
    layers = [nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 4)]
    return nn.Sequential(*layers), torch.randn(5, 6)


def residual() -> tuple[nn.Module, Tensor]:
    stages = Residual(8, 8), nn.Sequential(Residual(8, 12, stride=2), Residual(12, 12)), Residual(12, 16, stride=2)
    return Images(*stages, channels=16), torch.randn(5, 3, 8, 8)


def preactivation() -> tuple[nn.Module, Tensor]:
    return Images(PreActivation(8), PreActivation(8), channels=8), torch.randn(5, 3, 6, 6)


def inception() -> tuple[nn.Module, Tensor]:
    return Images(Inception(8), nn.ReLU(), Inception(8), channels=8), torch.randn(5, 3, 6, 6)


def nested() -> tuple[nn.Module, Tensor]:
    return Nested(), torch.randn(5, 6)


def branching() -> tuple[nn.Module, Tensor]:
    return nn.Sequential(nn.Linear(6, 6), Branching(6), Branching(6), nn.Linear(6, 4)), torch.randn(5, 6)


def transformer() -> tuple[nn.Module, Tensor]:
    return Transformer(), torch.randint(11, (3, 5))


def encoder() -> tuple[nn.Module, Tensor]:
    return Transformer(pooled=True), torch.randint(11, (3, 5))


MODELS = [perceptron, residual, preactivation, inception, nested, branching, transformer, encoder]


LAYOUTS: dict[int, Layout] = {1: "vector", 2: "tokens", 3: "map"}


def spec(
    *shape: int, classes: int, labels: bool = True, tokens: bool = False, criterion: Criterion = F.cross_entropy
) -> BorderSpec:
    """A border where a sample has that shape: a vector, tokens or a map."""
    targets = Targets(classes, labels=labels)
    return BorderSpec(shape, layout=LAYOUTS[len(shape)], targets=targets, tokens=tokens, criterion=criterion)


def leave_behind(value: float) -> None:
    """Free memory that holds this value everywhere."""
    freed = [torch.full((2**size,), value) for size in range(4, 18) for _ in range(10)]
    del freed
