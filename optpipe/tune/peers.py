"""The processes that train one network together, each with its part of every batch."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager
from typing import Protocol

import torch
from torch import nn


class Peers(Protocol):
    """One of several processes that do the same steps, and what it learns from the others.

    All of them call the same methods in the same order, each of which waits for all.
    """

    @property
    def rank(self) -> int:
        """The place of this process; the first one, 0, is the one that writes."""

    @property
    def size(self) -> int:
        """How many processes there are."""

    def joined(self, module: nn.Module) -> nn.Module:
        """A module that answers as this one; gradients of its parameters are the means over all processes."""

    def apart(self, module: nn.Module) -> AbstractContextManager[object]:
        """Within it the gradients of a joined module add up in this process alone."""

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradients of a loss that came of a joined module."""

    def normalised(self) -> AbstractContextManager[object]:
        """Within it a batch-norm in train mode takes its statistics of what all processes have."""

    def total(self, values: torch.Tensor) -> torch.Tensor:
        """The sum of such tensors of all processes."""

    def agreed(self, stop: bool) -> bool:
        """Whether any process is asked to stop, this one by ``stop`` or otherwise."""


class Alone:
    """A process that trains by itself."""

    rank = 0
    size = 1

    def joined(self, module: nn.Module) -> nn.Module:
        """The module itself."""
        return module

    def apart(self, module: nn.Module) -> AbstractContextManager[object]:
        """Nothing else."""
        return contextlib.nullcontext()

    def backward(self, loss: torch.Tensor) -> None:
        """The gradients of the loss."""
        loss.backward()  # type: ignore[no-untyped-call]

    def normalised(self) -> AbstractContextManager[object]:
        """Nothing else."""
        return contextlib.nullcontext()

    def total(self, values: torch.Tensor) -> torch.Tensor:
        """The values themselves."""
        return values

    def agreed(self, stop: bool) -> bool:
        """What this process is asked."""
        return stop


ALONE = Alone()


def own_part(places: range, peers: Peers) -> range:
    """The part of a row of places that is this process's: all have the same number, or one fewer."""
    begin, end = (len(places) * (peers.rank + edge) // peers.size for edge in (0, 1))
    return places[begin:end]
