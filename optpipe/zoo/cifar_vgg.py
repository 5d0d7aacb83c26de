"""VGG for 32x32 images: the convolutions of Simonyan and Zisserman's configurations A and D, with batch-norm.

As is usual on CIFAR, one linear layer takes the place of the three. The fifth max-pooling is left out, and
the last stage's map, 2x2 pixels of a 32x32 image, is averaged whatever its size: images down to 16x16 are
taken, and the logits of a smaller image come from the same head.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

# Channels of each stage's convolutions; between two stages an image is halved.
STAGES = {
    11: ((64,), (128,), (256, 256), (512, 512), (512, 512)),
    16: ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512)),
}


class CifarVGG(nn.Module):
    """A VGG of 3x3 convolutions, each with batch-norm and ReLU, in five stages."""

    def __init__(self, depth: int, classes: int, in_channels: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for stage in STAGES[depth]:
            if layers:
                layers.append(nn.MaxPool2d(2))
            for channels in stage:
                conv = nn.Conv2d(in_channels, channels, 3, padding=1, bias=False)
                layers += [conv, nn.BatchNorm2d(channels), nn.ReLU()]
                in_channels = channels
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(in_channels, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")
        nn.init.normal_(self.classifier.weight, std=0.01)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, classes) of images (N, in_channels, H, W)."""
        logits: Tensor = self.classifier(torch.flatten(self.avgpool(self.features(x)), 1))
        return logits


def vgg11(classes: int = 10, in_channels: int = 3) -> CifarVGG:
    """VGG-11 with batch-norm: 9.23 million parameters."""
    return CifarVGG(11, classes, in_channels)


def vgg16(classes: int = 10, in_channels: int = 3) -> CifarVGG:
    """VGG-16 with batch-norm: 14.7 million parameters."""
    return CifarVGG(16, classes, in_channels)


ARCHITECTURES = {"vgg11_cifar": vgg11, "vgg16_cifar": vgg16}
