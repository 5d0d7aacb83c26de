"""How smooth the loss is around a network's weights: condition number and surface (EKG, 3.1, 4.1 and A.3).

Pure: every function works on a copy of the network, whose weights, buffers, modes and gradients stay as they
were. Work is done where the network's parameters are, in their precision; float32 is enough.
"""

from __future__ import annotations

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
    "BatchNorm",
    "Expansion",
    "Extremes",
    "Objective",
    "Scale",
    "Surface",
    "Traverse",
    "condition",
    "directions",
    "extreme_eigenvalues",
    "gradient_direction_condition",
    "objective",
    "surface",
]
