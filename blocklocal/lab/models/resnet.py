"""Residual networks for small images, with torchvision's names (conv1, bn1, layer1.0.conv1, ..., fc).

resnet18, 34, 50: the widths of He et al. (2016) for ImageNet with a 3x3 stem of stride 1 and no pooling, for 32x32
pixels. resnet8, 20, 32, 56, 110: those for CIFAR, three stages of width 16, 32, 64; where a stage changes the shape,
the shortcut is a 1x1 convolution (option B of the paper).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with a shortcut."""

    expansion = 1

    def __init__(self, inputs: int, width: int, *, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = _shortcut(inputs, width, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(h)) + self.downsample(x))


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions with a shortcut; the output is four times as wide as the 3x3 convolution."""

    expansion = 4

    def __init__(self, inputs: int, width: int, *, stride: int) -> None:
        super().__init__()
        outputs = width * self.expansion
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.downsample = _shortcut(inputs, outputs, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.bn1(self.conv1(x)))
        h = torch.relu(self.bn2(self.conv2(h)))
        return torch.relu(self.bn3(self.conv3(h)) + self.downsample(x))


class ResNet(nn.Module):
    """A residual network. depths: residual blocks per stage; each stage after the first halves the resolution and
    doubles the width."""

    def __init__(
        self, block: type[BasicBlock | Bottleneck], depths: Sequence[int], *, width: int, channels: int, classes: int
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU()
        self.stages = [f"layer{i + 1}" for i in range(len(depths))]
        inputs = width
        for i, (name, depth) in enumerate(zip(self.stages, depths, strict=True)):
            stage = []
            for j in range(depth):
                stage.append(block(inputs, width * 2**i, stride=2 if i and not j else 1))
                inputs = width * 2**i * block.expansion
            self.add_module(name, nn.Sequential(*stage))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(inputs, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        h = self.relu(self.bn1(self.conv1(x)))
        for name in self.stages:
            h = self.get_submodule(name)(h)
        return self.fc(self.avgpool(h).flatten(1))


def _shortcut(inputs: int, outputs: int, *, stride: int) -> nn.Sequential:
    """The identity as an empty Sequential, or a 1x1 convolution where the shape changes."""
    if stride == 1 and inputs == outputs:
        return nn.Sequential()
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False), nn.BatchNorm2d(outputs))
