"""Architectures that torchvision lacks, found by name.

A file of this folder offers its networks in a dictionary ``ARCHITECTURES`` of name to function; a new
file is picked up without an edit here.
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections.abc import Callable
from typing import TYPE_CHECKING

from optpipe.errors import UsageError

if TYPE_CHECKING:
    from torch import nn

    Architecture = Callable[[int, int], nn.Module]


def architectures() -> dict[str, Architecture]:
    """Every network of the zoo: name to a function of (classes, input channels)."""
    found: dict[str, Architecture] = {}
    for module in pkgutil.iter_modules(__path__):
        found |= importlib.import_module(f"{__name__}.{module.name}").ARCHITECTURES
    return found


def build(name: str, classes: int = 10, in_channels: int = 3) -> nn.Module:
    """The named network with random weights; UsageError, with the nearest name, for an unknown one."""
    known = architectures()
    if name not in known:
        nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
        raise UsageError(
            f"model 'zoo:{name}' is unknown; did you mean 'zoo:{nearest}'? The zoo has {', '.join(known)}"
        )
    return known[name](classes, in_channels)
