"""Two small networks: a multi-layer perceptron and a plain convolutional network."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn


def mlp(*, channels: int, size: tuple[int, int], classes: int, width: int = 256, depth: int = 4) -> nn.Sequential:
    """`depth` hidden layers, each linear, batch normalisation, ReLU: layer1, layer2, ..., fc."""
    layers: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
    inputs = channels * size[0] * size[1]
    for i in range(depth):
        layers[f"layer{i + 1}"] = nn.Sequential(nn.Linear(inputs, width), nn.BatchNorm1d(width), nn.ReLU())
        inputs = width
    layers["fc"] = nn.Linear(inputs, classes)
    return nn.Sequential(layers)


def cnn(*, channels: int, size: tuple[int, int], classes: int, width: int = 16) -> nn.Sequential:
    """Four 3x3 convolutions with batch normalisation and ReLU, the third and fourth at half and quarter resolution.

    For images of 16 pixels and more, the first two are at full and half resolution too: layer1, ..., layer4, fc.
    """
    strides = (1, 2, 2, 2) if min(size) >= 16 else (1, 1, 2, 2)
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    inputs = channels
    for i, stride in enumerate(strides):
        outputs = width * 2 ** min(i, 2)
        convolution = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        layers[f"layer{i + 1}"] = nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU())
        inputs = outputs
    layers["avgpool"] = nn.AdaptiveAvgPool2d(1)
    layers["flatten"] = nn.Flatten()
    layers["fc"] = nn.Linear(inputs, classes)
    return nn.Sequential(layers)
