"""A plain convolutional network like VGG (Simonyan and Zisserman, 2015), small enough to learn layer by layer."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

WIDTHS = (1, 2, 2, 4, 4, 4, 8)
POOLED = (2, 4, 5, 6)  # layers


def vgg8(*, channels: int, size: tuple[int, int], classes: int, width: int = 16) -> nn.Sequential:
    """Seven 3x3 convolutions with batch normalisation and ReLU, and a linear classifier: layer1, ..., layer7, fc.

    The convolutions are those of vgg8b (Nøkland and Eidnes, 2019) at an eighth of its width, with a seventh instead of
    its hidden linear layer. Layers 2, 4, 5 and 6 end in max-pooling by two if their input has at least 4 pixels.
    """
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    inputs, side = channels, min(size)
    for i, factor in enumerate(WIDTHS, start=1):
        outputs = width * factor
        convolution = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        layer = nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU())
        if i in POOLED and side >= 4:
            layer.append(nn.MaxPool2d(2))
            side //= 2
        layers[f"layer{i}"] = layer
        inputs = outputs
    layers["avgpool"] = nn.AdaptiveAvgPool2d(1)
    layers["flatten"] = nn.Flatten()
    layers["fc"] = nn.Linear(inputs, classes)
    return nn.Sequential(layers)
