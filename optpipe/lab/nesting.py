"""What one plan takes out beyond another, for a training that goes on from an earlier one."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from optpipe import graph, store
from optpipe.errors import RunError, UsageError
from optpipe.types import Plan, Start

if TYPE_CHECKING:
    from torch import fx


def begin(
    original: fx.GraphModule, start: Start | None, plan: Plan, shape: tuple[int, int, int], run: store.Run
) -> tuple[fx.GraphModule, Plan]:
    """The network that a training starts with, and what is left to take out of it to come to ``plan``.

    ``shape`` is (C, H, W) of the original's images. Channels of layers that went with the start's units are
    left out of what is left: as in any plan, they change nothing.

    Raises:
        UsageError: the start lacks something that the plan leaves in.
        RunError: the start's weights are gone.
    """
    if start is None:
        return original, plan
    left = further(start.plan, plan)
    begun = graph.apply(original, start.plan, shape)
    path = run.weights(start.key)
    if not run.has(path):
        raise RunError(f"{path}: the weights that a training goes on from are gone; start anew with --fresh")
    store.load_tensors(begun, path, start.part)
    standing, known = dict(begun.named_modules()), dict(original.named_modules())
    entries = [entry for entry in left.keep_channels if entry[0] in standing or entry[0] not in known]
    return begun, replace(left, keep_channels=tuple(entries))


def further(done: Plan, plan: Plan) -> Plan:
    """What is left to take out of the network that ``done`` left of the original, to come to ``plan``.

    Channels are counted among those that ``done`` kept; blocks that are gone are not named again. The
    resolution is the plan's own.

    Raises:
        UsageError: ``done`` took out something that ``plan`` leaves in.
    """
    back = [name for name in done.drop_blocks if name not in plan.drop_blocks]
    if back:
        raise _not_nested(f"block {back[0]!r} is gone already")
    _check_sizes(done.input_hw, plan.input_hw)
    return Plan(
        drop_blocks=tuple(name for name in plan.drop_blocks if name not in done.drop_blocks),
        keep_channels=_channels_left(dict(done.keep_channels), dict(plan.keep_channels)),
        input_hw=plan.input_hw,
    )


def _check_sizes(done: tuple[int, int] | None, wanted: tuple[int, int] | None) -> None:
    """UsageError where images are to be larger again, None being the original's size."""
    if done is None or (wanted is not None and wanted[0] <= done[0] and wanted[1] <= done[1]):
        return
    asked = "the original's size" if wanted is None else f"{wanted[0]}x{wanted[1]}"
    raise _not_nested(f"images were {done[0]}x{done[1]}, and are to be {asked}")


def _channels_left(
    done: dict[str, tuple[int, ...]], wanted: dict[str, tuple[int, ...]]
) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """The channels that each group keeps, by their places among those that it has left."""
    whole = [name for name in done if name not in wanted]
    if whole:
        raise _not_nested(f"group {whole[0]!r} is narrowed already")
    left: list[tuple[str, tuple[int, ...]]] = []
    for name, kept in wanted.items():
        if name not in done:
            left.append((name, kept))
            continue
        places = {channel: place for place, channel in enumerate(done[name])}
        gone = [channel for channel in kept if channel not in places]
        if gone:
            raise _not_nested(f"channel {gone[0]} of group {name!r} is gone already")
        if len(kept) < len(places):
            left.append((name, tuple(places[channel] for channel in kept)))
    return tuple(left)


def _not_nested(why: str) -> UsageError:
    return UsageError(
        f"a training cannot go on from a network that lacks what its plan leaves in: {why}; start it at the "
        "original, or at a plan that takes out less"
    )
