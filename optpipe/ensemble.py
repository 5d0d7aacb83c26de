"""Several networks as one, which says beside its answer how far it can be trusted."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

OUTPUTS = ("logits", "uncertainty")
"""The names of an ensemble's outputs."""


class Ensemble(nn.Module):
    """S networks of the same images and classes that answer together.

    Of images (N, C, H, W) it gives ``logits`` (N, classes), the log of the members' mean probabilities, whose
    softmax is that mean; and ``uncertainty`` (N, 2) in nats: the members' mean entropy, which is aleatoric,
    and the mutual information of the class and the member, which is epistemic (optpipe.uncertainty has the
    equations). Both are float32.
    """

    def __init__(self, members: Sequence[nn.Module]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Logits and uncertainty."""
        logs = _log_probabilities(self.members, images)
        mean = _log_mean(logs)
        expected = _entropy(logs).mean(dim=0)
        information = (_entropy(mean) - expected).clamp_min(0.0)
        return mean, torch.stack([expected, information], dim=1)


class Answer(nn.Module):
    """An ensemble without its second output, for engines, which have one output."""

    def __init__(self, ensemble: Ensemble) -> None:
        super().__init__()
        self.members = ensemble.members

    def forward(self, images: Tensor) -> Tensor:
        """The ensemble's logits (N, classes)."""
        return _log_mean(_log_probabilities(self.members, images))


def _log_probabilities(members: nn.ModuleList, images: Tensor) -> Tensor:
    """Each member's log-probabilities, (S, N, classes)."""
    return torch.stack([torch.log_softmax(member(images).float(), dim=1) for member in members])


def _log_mean(logs: Tensor) -> Tensor:
    """The log of the mean over the first axis of what these are the logs of.

    The largest is taken out by hand: not every engine does so by itself, and the log of 0 would be infinite.
    """
    largest = logs.amax(dim=0)
    return largest + (logs - largest).exp().sum(dim=0).log() - math.log(len(logs))


def _entropy(logs: Tensor) -> Tensor:
    """-sum p log p over the classes, from log p, which is finite."""
    return -(logs.exp() * logs).sum(dim=-1)
