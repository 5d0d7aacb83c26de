"""A finished run's copy of its recipe's ``[gate]`` table.

It lies beside recipe.toml, not in it: that may not change while a run is resumed, and limits may.
"""

from __future__ import annotations

from pathlib import Path

from optpipe import files, store
from optpipe.errors import UsageError
from optpipe.types import Limits

NAME = "gate.json"


def write(folder: Path, limits: Limits) -> None:
    """Write the limits into a run's folder."""
    files.write_atomically(folder / NAME, store.to_sealed(limits))


def read(run: Path) -> Limits:
    """The limits of a run, none where it has no file of them; ``run`` is its folder or its report.json.

    Raises:
        UsageError: the file is damaged.
    """
    path = (run.parent if run.is_file() else run) / NAME
    try:
        limits = store.from_json(Limits, path.read_bytes())
    except FileNotFoundError:
        return Limits()
    except ValueError:
        raise UsageError(f"{path}: is damaged; give the same optpipe run again to have it anew") from None
    problem = limits.problem()
    if problem is not None:
        raise UsageError(f"{path}: {problem[0]} = {problem[1]:g}: {problem[2]}")
    return limits
