"""ResNets for 32x32 images: He et al., "Deep Residual Learning for Image Recognition", section 4.2.

Depth 6n + 2: three stages of n basic blocks with 16, 32 and 64 channels. Shortcuts that change shape
have no parameters (the paper's option A).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PadShortcut(nn.Module):
    """Every second pixel, and zero channels on both sides: a shortcut without parameters (option A)."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.before = (out_channels - in_channels) // 2
        self.after = out_channels - in_channels - self.before

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to (N, out_channels, H/2, W/2), rounded up."""
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.before, self.after))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with batch-norm, added to the shortcut."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        same = stride == 1 and in_channels == out_channels
        self.shortcut = nn.Identity() if same else PadShortcut(in_channels, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) to (N, out_channels, H/stride, W/stride)."""
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return F.relu(y + self.shortcut(x))


class CifarResNet(nn.Module):
    """A ResNet of three stages of ``blocks`` basic blocks each."""

    def __init__(self, blocks: int, classes: int, in_channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = _stage(16, 16, blocks, stride=1)
        self.layer2 = _stage(16, 32, blocks, stride=2)
        self.layer3 = _stage(32, 64, blocks, stride=2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(64, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, classes) of images (N, in_channels, H, W)."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        logits: Tensor = self.linear(torch.flatten(self.avgpool(x), 1))
        return logits


def _stage(in_channels: int, out_channels: int, blocks: int, stride: int) -> nn.Sequential:
    first = BasicBlock(in_channels, out_channels, stride)
    return nn.Sequential(first, *(BasicBlock(out_channels, out_channels, 1) for _ in range(blocks - 1)))


def resnet20(classes: int = 10, in_channels: int = 3) -> CifarResNet:
    """ResNet-20: 0.27 million parameters."""
    return CifarResNet(3, classes, in_channels)


def resnet32(classes: int = 10, in_channels: int = 3) -> CifarResNet:
    """ResNet-32: 0.46 million parameters."""
    return CifarResNet(5, classes, in_channels)


def resnet44(classes: int = 10, in_channels: int = 3) -> CifarResNet:
    """ResNet-44: 0.66 million parameters."""
    return CifarResNet(7, classes, in_channels)


def resnet56(classes: int = 10, in_channels: int = 3) -> CifarResNet:
    """ResNet-56: 0.85 million parameters."""
    return CifarResNet(9, classes, in_channels)


ARCHITECTURES = {
    "resnet20_cifar": resnet20,
    "resnet32_cifar": resnet32,
    "resnet44_cifar": resnet44,
    "resnet56_cifar": resnet56,
}
