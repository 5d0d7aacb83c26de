"""MobileNetV2 for 32x32 images: Sandler et al., "MobileNetV2: Inverted Residuals and Linear Bottlenecks".

torchvision's network with the strides of the stem and of the 24-channel stage set to 1, as is usual on
CIFAR: an image is halved three times instead of five, and the last stage still sees 4x4 pixels.
"""

from __future__ import annotations

from torch import nn
from torchvision.models import MobileNetV2

# Expansion, channels, blocks, stride of the first block: Table 2 of the paper but for the second stride.
STAGES = [
    [1, 16, 1, 1],
    [6, 24, 2, 1],
    [6, 32, 3, 2],
    [6, 64, 4, 2],
    [6, 96, 3, 1],
    [6, 160, 3, 2],
    [6, 320, 1, 1],
]


def mobilenet_v2(classes: int = 10, in_channels: int = 3) -> nn.Module:
    """MobileNetV2 without dropout: 2.24 million parameters, 88.0 million MACs for ten classes.

    Parameters are named as in torchvision's network.
    """
    model: nn.Module = MobileNetV2(num_classes=classes, inverted_residual_setting=STAGES, dropout=0.0)
    stem = nn.Conv2d(in_channels, 32, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(stem.weight, mode="fan_out")
    model.set_submodule("features.0.0", stem)
    return model


ARCHITECTURES = {"mobilenet_v2_cifar": mobilenet_v2}
