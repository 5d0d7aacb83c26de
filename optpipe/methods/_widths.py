"""Which groups a method may narrow, where what the recovery compares has to keep its shape."""

from __future__ import annotations

from optpipe import graph
from optpipe.errors import UsageError
from optpipe.types import Scene

COMPARED = "the recovery compares its channels with the original's"
"""Why a group stays whole whose channels the recovery needs as they are."""


def narrowable(scene: Scene, method: str) -> graph.WidthMap:
    """The groups to narrow: all that can be, but for those whose channels the recovery is to compare.

    Raises UsageError where there is none.
    """
    widths = graph.width_map(scene.model, scene.graph.input_shape)
    # "cross" hands the original's features to the candidate's classifier: they need as many channels.
    if scene.recover.compares_features:
        original = graph.trace(scene.model, scene.graph.input_shape)
        _, head = graph.split(original)
        compared = {str(node.target) for node in head.graph.nodes if node.op == "call_module"}
        if scene.recover.stage_weight:
            compared |= set(graph.stage_readers(original))
        widths = widths.without(compared, COMPARED)
    if not widths.groups:
        reason = next((group.why_not for group in widths.fixed), "it has no layer")
        raise UsageError(f"[method] {method}: no channel group of the network can be narrowed: {reason}")
    return widths
