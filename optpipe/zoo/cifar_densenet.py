"""DenseNet for 32x32 images: Huang et al., "Densely Connected Convolutional Networks", section 3.

Three dense blocks of equally many layers, without bottlenecks and without compression; every layer adds
``growth`` feature maps to those before it. There is no dropout.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class DenseLayer(nn.Module):
    """Batch-norm, ReLU and a 3x3 convolution, whose features are concatenated to what they are made of."""

    def __init__(self, in_channels: int, growth: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(in_channels)
        self.conv = nn.Conv2d(in_channels, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) to (N, in_channels + growth, H, W)."""
        return torch.cat([x, self.conv(F.relu(self.bn(x)))], 1)


class Transition(nn.Module):
    """A 1x1 convolution that keeps the channels, and average pooling of 2x2 pixels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(channels)
        self.conv = nn.Conv2d(channels, channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(N, channels, H, W) to (N, channels, H/2, W/2), rounded down."""
        return F.avg_pool2d(self.conv(F.relu(self.bn(x))), 2)


class CifarDenseNet(nn.Module):
    """A DenseNet of three dense blocks of ``layers`` layers each."""

    def __init__(self, layers: int, growth: int, classes: int, in_channels: int) -> None:
        super().__init__()
        width, added = 16, layers * growth
        self.conv1 = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
        self.block1 = _block(width, growth, layers)
        self.transition1 = Transition(width + added)
        self.block2 = _block(width + added, growth, layers)
        self.transition2 = Transition(width + 2 * added)
        self.block3 = _block(width + 2 * added, growth, layers)
        self.bn = nn.BatchNorm2d(width + 3 * added)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(width + 3 * added, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, classes) of images (N, in_channels, H, W)."""
        x = self.transition1(self.block1(self.conv1(x)))
        x = self.block3(self.transition2(self.block2(x)))
        logits: Tensor = self.linear(torch.flatten(self.avgpool(F.relu(self.bn(x))), 1))
        return logits


def _block(in_channels: int, growth: int, layers: int) -> nn.Sequential:
    return nn.Sequential(*(DenseLayer(in_channels + layer * growth, growth) for layer in range(layers)))


def densenet40(classes: int = 10, in_channels: int = 3) -> CifarDenseNet:
    """DenseNet-40 with a growth of 12: 1.02 million parameters."""
    return CifarDenseNet(12, 12, classes, in_channels)


ARCHITECTURES = {"densenet40_cifar": densenet40}
