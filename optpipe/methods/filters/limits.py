"""What cannot be asked of plain filter pruning, and which groups of channels a style narrows."""

from __future__ import annotations

from dataclasses import dataclass

from optpipe import graph
from optpipe.errors import UsageError
from optpipe.methods._meter import refuse_blocks, refuse_sparsity
from optpipe.methods._widths import COMPARED, narrowable
from optpipe.methods.filters.config import Config
from optpipe.types import Budget, ChannelGroup, Images, ModelGraph, Scene, Tune

NORMAL = 'a sum ties it to a residual stream, which style = "normal" leaves whole'


@dataclass(frozen=True, slots=True)
class Scope:
    """The groups to narrow, and those of the residual streams that "residual" cannot narrow."""

    widths: graph.WidthMap
    held: tuple[ChannelGroup, ...] = ()


def check(
    shown: ModelGraph,
    calibration: Images,
    budget: Budget,
    config: Config,
    recover: Tune,
    validation: Images | None = None,
) -> None:
    """UsageError for settings, a budget or a network that no search can be made of."""
    refuse_sparsity(budget, "filters")
    refuse_blocks(budget, "filters")
    if config.builds < 1:
        raise UsageError(f"[method] builds = {config.builds}: must be at least 1")
    free = [group for group in shown.groups if group.prunable]
    if not free:
        reason = next((group.why_not for group in shown.groups), "it has no layer")
        raise UsageError(
            f"[method] filters: the network has no channel group that can be narrowed ({reason}); `optpipe "
            "inspect` says why not for each"
        )
    # A sum ties at least two layers; whether one does is seen where the network itself is at hand.
    if config.style == "residual" and not any(len(group.layers) > 1 for group in free):
        raise _nothing_more([group for group in shown.groups if not group.prunable and len(group.layers) > 1])


def scope(scene: Scene, config: Config) -> Scope:
    """The groups that the style narrows, the others fixed with their reason.

    Raises UsageError where there is none, or where "residual" could narrow no more than "normal".
    """
    widths = narrowable(scene, "filters")
    summed = graph.stream_layers(scene.model, scene.graph.input_shape)
    in_streams = [bool(summed.intersection(group.layers)) for group in widths.groups]
    held = tuple(group for group in widths.fixed if summed.intersection(group.layers))
    if config.style == "residual":
        if not any(in_streams):
            raise _nothing_more(held)
        return Scope(widths, held)
    widths = widths.holding(in_streams, NORMAL)
    if not widths.groups:
        raise UsageError(
            '[method] style = "normal": every channel group that can be narrowed belongs to a residual '
            'stream; set style = "residual"'
        )
    return Scope(widths)


def _nothing_more(held: list[ChannelGroup] | tuple[ChannelGroup, ...]) -> UsageError:
    why = f"{held[0].name}: {held[0].why_not}" if held else "it has no sum of feature maps"
    mend = 'set style = "normal"'
    if held and held[0].why_not == COMPARED:
        mend += (
            ", or a recovery that compares fewer features: [recover] stage_weight = 0 leaves the streams "
            'of all but the last stage free, loss = "kd" or "labels" that one too'
        )
    return UsageError(f'[method] style = "residual": no residual stream can be narrowed ({why}); {mend}')
