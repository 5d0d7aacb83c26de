"""A name is a file: ``practise`` is ``optpipe/methods/practise.py``.

Third parties add a method or a backend through an entry point of the group ``optpipe.methods`` or
``optpipe.backends`` whose value is a module. Only the named module is imported.
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from importlib.metadata import entry_points
from typing import cast

from optpipe.errors import UsageError
from optpipe.types import Backend, Method


def method(name: str) -> Method:
    """The module of a pruning method.

    Raises:
        UsageError: no method has this name; the nearest is named.
    """
    return cast(Method, _module("methods", name))


def backend(name: str) -> Backend:
    """The module of a backend.

    Raises:
        UsageError: no backend has this name; the nearest is named.
    """
    return cast(Backend, _module("backends", name))


def names(room: str) -> list[str]:
    """The names that can stand in a recipe; ``room`` is "methods" or "backends"."""
    package = importlib.import_module(f"optpipe.{room}")
    own = [info.name for info in pkgutil.iter_modules(package.__path__) if not info.name.startswith("_")]
    return sorted({*own, *(point.name for point in entry_points(group=f"optpipe.{room}"))})


def _module(room: str, name: str) -> object:
    known = names(room)
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]}?" if near else f"there are: {', '.join(known)}"
        place = "[method] name" if room == "methods" else "[target] backend"
        raise UsageError(f'{place} = "{name}": there is no such {room[:-1]}; {hint}')
    for point in entry_points(group=f"optpipe.{room}"):
        if point.name == name:
            return point.load()
    return importlib.import_module(f"optpipe.{room}.{name}")
