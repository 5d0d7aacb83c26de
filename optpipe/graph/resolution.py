"""The size of a network's images: what a plan makes of it, and whether the network can do with less."""

from __future__ import annotations

from collections.abc import Iterable

from torch import fx, nn

from optpipe.errors import UsageError
from optpipe.graph.trace import propagate, shape, trace
from optpipe.types import Plan


def image_shape(plan: Plan, input_shape: tuple[int, int, int]) -> tuple[int, int, int]:
    """(C, H, W) of the candidate's images, where the original's are ``input_shape``.

    Raises UsageError for a size below one pixel or above the original's.
    """
    if plan.input_hw is None:
        return input_shape
    channels, *whole = input_shape
    height, width = plan.input_hw
    if min(height, width) < 1 or height > whole[0] or width > whole[1]:
        raise UsageError(
            f"the plan's input_hw is {height}x{width}; it must lie between 1x1 and the original's "
            f"{whole[0]}x{whole[1]}"
        )
    return channels, height, width


def check_size(traced: fx.GraphModule, image: tuple[int, int, int]) -> None:
    """Raise UsageError if the network does not give (1, classes) for one image of this shape."""
    refusal = _refusal(traced, image)
    if refusal:
        raise UsageError(
            f"{type(traced).__name__} takes no image of {image[1]}x{image[2]}: {refusal}; choose another "
            "size, or a network that pools globally before its classifier"
        )


def fixed_size(traced: fx.GraphModule, input_shape: tuple[int, int, int]) -> str:
    """Why the network takes no smaller image than ``input_shape``; "" where it takes one.

    Three quarters and half of the size are tried, then the next smaller multiples of 32, 16 and 8, for
    networks that take multiples of their total stride alone. One accepted size is enough: a network may
    still refuse others, which ``apply`` does one by one.
    """
    refusals = []
    for size in _smaller(input_shape):
        refusal = _refusal(traced, size)
        if not refusal:
            return ""
        refusals.append(f"an image of {size[1]}x{size[2]} fails {refusal}")
    return refusals[0] if refusals else "an image of one pixel cannot be made smaller"


def sizes_taken(
    model: nn.Module, input_shape: tuple[int, int, int], sizes: Iterable[tuple[int, int]]
) -> tuple[tuple[int, int], ...]:
    """Those of these sizes (H, W) of images that the network takes, in their order.

    Each is tried by itself: a network that pools often refuses the small ones, one that takes multiples of
    its total stride alone refuses those between. Raises UsageError for a model that cannot be traced.
    """
    traced = trace(model, input_shape)
    return tuple(size for size in sizes if not _refusal(traced, (input_shape[0], *size)))


def _smaller(input_shape: tuple[int, int, int]) -> list[tuple[int, int, int]]:
    """The sizes that are tried, each once, without those below one pixel."""
    channels, height, width = input_shape
    shares = [(height * 3 // 4, width * 3 // 4), (height // 2, width // 2)]
    steps = [((height - 1) // step * step, (width - 1) // step * step) for step in (32, 16, 8)]
    return [(channels, h, w) for h, w in dict.fromkeys(shares + steps) if min(h, w) >= 1]


def _refusal(traced: fx.GraphModule, image: tuple[int, int, int]) -> str:
    """Where and why the network gives no (1, classes) for an image of this shape; "" where it does."""
    # A second graph over the same parameters: the shapes at the original's size stay on the first.
    graph = fx.Graph()
    graph.output(graph.graph_copy(traced.graph, {}))
    resized = fx.GraphModule(traced, graph, type(traced).__name__).eval()
    try:
        propagate(resized, image)
    except UsageError as error:
        # What it says after the shape: the layer, and torch's reason.
        return "at " + str(error).partition(": at ")[2].rpartition("; ")[0]
    before, after = (shape(next(reversed(network.graph.nodes))) for network in (traced, resized))
    if before != after:
        return f"at the output: it gives {after}, not {before}"
    return ""
