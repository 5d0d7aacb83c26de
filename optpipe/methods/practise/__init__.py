"""PRACTISE: drop residual blocks, recover from a tiny unlabelled set (Wang and Wu, "Practical Network
Acceleration with Tiny Sets").

Each droppable block B is given its saving tau(B) on the target (Eq. 32) and its recoverability R(B)
(Eq. 31); blocks of low R/tau (Eq. 33) go first, until the measured latency of the combined candidate meets
the budget. Recovery mimics the original's features (Eq. 34). The criteria that the paper compares itself
with, and two that look at nothing, are in :mod:`~optpipe.methods.practise.scores`.

Deliberate deviations. A block whose saving is not clearly above zero is never dropped, whatever the
criterion: R/tau would put one whose removal made the engine slower first. Latencies do not add up, so every
prefix is built and timed. ``select = "joint"`` scores the remaining blocks anew after each
drop, by the error that each adds; the default is to score once, as the paper's Algorithm 1 does: in trials on
CIFAR-10 ResNet-56 with equal recovery, scoring once chose the better nine blocks.

Recovery departs from the paper's settings too: a higher rate, a cosine schedule, shifts and CutMix for
resized crops, and the stages' outputs in the loss. The recipe ``cifar10/practise_resnet56_paper.toml`` takes
all of it back; ``benchmarks/budgets.py`` measures either.
"""

from __future__ import annotations

from optpipe.methods._mimicry import MIMIC
from optpipe.methods.practise.config import Config
from optpipe.methods.practise.limits import check
from optpipe.methods.practise.selection import search

__all__ = ["NEEDS_LABELS", "RECOVER", "Config", "check", "search"]

NEEDS_LABELS = False

RECOVER = MIMIC
