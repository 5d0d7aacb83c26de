"""The network as a graph: its units of depth and channel groups, and the surgery on them.

Nothing here touches a file, a clock or a global random state, and no function changes its argument.
"""

from __future__ import annotations

from torch import fx, nn

from optpipe.errors import UsageError
from optpipe.graph.adaptors import adaptors, fold, with_adaptors
from optpipe.graph.channels import channel_groups
from optpipe.graph.costs import Costs
from optpipe.graph.features import split
from optpipe.graph.gates import Gated
from optpipe.graph.masks import (
    Granularity,
    Masks,
    fours,
    from_fours,
    sparsity,
    weight_count,
    with_weights,
)
from optpipe.graph.probes import UnitScore, unit_discrimination
from optpipe.graph.refit import refit_errors
from optpipe.graph.removal import Effect, removal_effects
from optpipe.graph.rescale import rescale
from optpipe.graph.resolution import fixed_size, image_shape, sizes_taken
from optpipe.graph.scales import channel_scales, keep_largest, scale_sources
from optpipe.graph.stages import observe, stage_readers
from optpipe.graph.streams import stream_layers
from optpipe.graph.structure import structure_key
from optpipe.graph.surgery import apply
from optpipe.graph.trace import count, shape, total, trace
from optpipe.graph.units import depth_units
from optpipe.graph.width_map import Part, WidthMap, width_map
from optpipe.types import ModelGraph

__all__ = [
    "Costs",
    "Effect",
    "Gated",
    "Granularity",
    "Masks",
    "Part",
    "UnitScore",
    "WidthMap",
    "adaptors",
    "apply",
    "channel_scales",
    "count",
    "fold",
    "fours",
    "from_fours",
    "image_shape",
    "inspect",
    "keep_largest",
    "observe",
    "refit_errors",
    "removal_effects",
    "rescale",
    "scale_sources",
    "sizes_taken",
    "sparsity",
    "split",
    "stage_readers",
    "stream_layers",
    "structure_key",
    "trace",
    "unit_discrimination",
    "weight_count",
    "width_map",
    "with_adaptors",
    "with_weights",
]


def inspect(model: nn.Module, input_shape: tuple[int, int, int]) -> ModelGraph:
    """Every unit of depth and channel group of ``model`` in execution order, with its totals.

    Raises UsageError for a model that cannot be traced or does not return logits (N, classes).
    """
    traced: fx.GraphModule = trace(model, input_shape)
    output = next(node for node in traced.graph.nodes if node.op == "output")
    logits = shape(output) or ()
    if len(logits) != 2:
        raise UsageError(
            f"{type(model).__name__} returns {logits or 'no tensor'}; logits (N, classes) are needed"
        )
    parameters, macs = total(traced)
    return ModelGraph(
        blocks=tuple(unit.block for unit in depth_units(traced)),
        groups=channel_groups(traced, input_shape),
        parameters=parameters,
        macs=macs,
        input_shape=input_shape,
        classes=logits[-1],
        fixed_size=fixed_size(traced, input_shape),
    )
