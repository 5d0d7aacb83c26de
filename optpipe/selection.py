"""Which backend a recipe's target means: the one it names, the first that loads, or all that load."""

from __future__ import annotations

from dataclasses import dataclass, replace

from optpipe import plugins
from optpipe.errors import MissingError, UsageError
from optpipe.types import Target

AUTO = "auto"
FASTEST = "fastest"

ORDER = {"cpu": ("onnxruntime",), "cuda": ("tensorrt", "onnxruntime", "inductor")}
"""What "auto" tries on a device, the one that usually gives the fastest engines first."""


@dataclass(frozen=True, slots=True)
class Selected:
    """The names of the backends to build with, one unless the fastest is sought; ``note`` says why these.

    ``absent`` holds the name of each that does not load here and what it lacks.
    """

    names: tuple[str, ...]
    note: str = ""
    absent: tuple[tuple[str, str], ...] = ()


def select(target: Target) -> Selected:
    """The backends that ``target.backend`` stands for on this machine.

    Raises:
        UsageError: there is no such backend, or it does not run such a target on any machine.
        MissingError: this machine lacks what it takes.
    """
    if target.device not in ORDER:
        raise UsageError(f'target.device = "{target.device}": must be one of {", ".join(ORDER)}')
    if target.backend == AUTO:
        return _first(target)
    if target.backend == FASTEST:
        return _all(target)
    lacking = _lacking(target.backend, target)
    if lacking:
        raise MissingError(lacking)
    return Selected((target.backend,))


def _first(target: Target) -> Selected:
    absent: list[tuple[str, str]] = []
    order = ORDER[target.device]
    refused: UsageError | None = None
    for name in order:
        # Where there is only one, its own words on what it does not run are the better ones.
        lacking = _not_offered(name, target) if len(order) > 1 else None
        try:
            lacking = lacking or _lacking(name, target)
        except UsageError as error:  # an option of another backend, say
            refused, lacking = refused or error, str(error)
        if lacking is None:
            skipped = "; ".join(f"{other} does not: {why}" for other, why in absent)
            why = f"{name} builds the engines on {target.device}: " + (
                f"it loads, {skipped}" if skipped else "the first choice, and it loads"
            )
            return Selected((name,), why if len(order) > 1 else "", tuple(absent))
        absent.append((name, lacking))
    if refused is not None:
        raise refused
    if len(absent) == 1:
        raise MissingError(absent[0][1])
    reasons = "; ".join(f"{name}: {why}" for name, why in absent)
    raise MissingError(f"no backend loads on {target.device}: {reasons}")


def _all(target: Target) -> Selected:
    if target.options:
        raise UsageError(
            f'target.options: backend = "{FASTEST}" takes none, for each backend has its own; name a backend'
        )
    names: list[str] = []
    absent: list[tuple[str, str]] = []
    for name in plugins.names("backends"):
        lacking = _not_offered(name, target) or _lacking(name, target)
        if lacking is None:
            names.append(name)
        else:
            absent.append((name, lacking))
    if not names:
        reasons = "; ".join(f"{name}: {why}" for name, why in absent)
        raise MissingError(f"no backend loads on {target.device} at {target.precision}: {reasons}")
    return Selected(tuple(names), f"the fastest of {', '.join(names)} is sought", tuple(absent))


def _not_offered(name: str, target: Target) -> str | None:
    """That a backend runs the target's precision or device on no machine; None if it does."""
    offered = plugins.backend(name).precisions(target.device)
    if target.precision in offered:
        return None
    runs = f"runs {', '.join(offered)} on" if offered else "does not run on"
    wanted = f", not {target.precision}" if offered else ""
    return f"{runs} {target.device}{wanted}"


def _lacking(name: str, target: Target) -> str | None:
    return plugins.backend(name).missing(replace(target, backend=name))
