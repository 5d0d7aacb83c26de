"""How smooth the loss is around a network's weights and between networks, and what more images would do.

Condition number and surface are EKG's (3.1, 4.1 and A.3), lines between networks and loss leakage PRACTISE's
(Sec. 3).

Pure: every function works on a copy of the network, whose weights, buffers, modes and gradients stay as they
were. Work is done where the network's parameters are, in their precision; float32 is enough.
"""

from __future__ import annotations

from optpipe.landscape.interpolation import SHARES, Convexity, along, between, convexity, embed
from optpipe.landscape.leakage import Errors, Estimate, Gap, Leakage, gap, leakage
from optpipe.landscape.objective import BatchNorm, Expansion, Objective, objective
from optpipe.landscape.spectrum import (
    Extremes,
    Traverse,
    condition,
    extreme_eigenvalues,
    gradient_direction_condition,
)
from optpipe.landscape.surface import Scale, Surface, directions, surface

__all__ = [
    "SHARES",
    "BatchNorm",
    "Convexity",
    "Errors",
    "Estimate",
    "Expansion",
    "Extremes",
    "Gap",
    "Leakage",
    "Objective",
    "Scale",
    "Surface",
    "Traverse",
    "along",
    "between",
    "condition",
    "convexity",
    "directions",
    "embed",
    "extreme_eigenvalues",
    "gap",
    "gradient_direction_condition",
    "leakage",
    "objective",
    "surface",
]
