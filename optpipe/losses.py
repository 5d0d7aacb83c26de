"""What training minimises. Pure."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F


def feature_mse(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """The mean squared difference of two feature maps (N, C, H, W), in float32 (PRACTISE, Eqs 31 and 34).

    The paper writes a squared Frobenius norm, which is this times N*C*H*W: a constant that moves into the
    learning rate, and the mean keeps one rate fit for all networks.
    """
    return F.mse_loss(student.float(), teacher.float())


def mimicking_loss(
    student: Sequence[torch.Tensor], teacher: Sequence[torch.Tensor], stage_weight: float
) -> torch.Tensor:
    """:func:`feature_mse` of the features, which come first, plus ``stage_weight`` times each stage's."""
    loss = feature_mse(student[0], teacher[0])
    for own, other in zip(student[1:], teacher[1:], strict=True):
        loss = loss + stage_weight * feature_mse(own, other)
    return loss
