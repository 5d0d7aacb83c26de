"""What the loss of a block alone does to a network, before any recovery, from one pass over the images.

Every block is taken out of a network whose tensors are all at hand: what lies before the block is computed
once for all blocks, and only what follows it is computed again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.fx.node import Argument, Target

from optpipe.graph.blocks import Residual, residuals
from optpipe.graph.features import feature_node
from optpipe.graph.flow import past_nothing
from optpipe.graph.surgery import apply
from optpipe.graph.trace import shape, trace
from optpipe.types import Images, Plan

Effect = Literal["features", "answers", "response"]
# All tensors of a batch are kept for as long as it is worked on.
BATCH_BYTES = 2**28
MAX_BATCH = 128
# Stands for what is not finite: a network that overflows without a block can do the least without it.
LARGEST = torch.finfo(torch.float32).max

_Values = dict[fx.Node, torch.Tensor]


def removal_effects(
    model: nn.Module,
    dropped: Plan,
    names: Sequence[str],
    images: Images,
    input_shape: tuple[int, int, int],
    effect: Effect,
) -> tuple[float, ...]:
    """For each name what dropping that block beside those of ``dropped`` does on all ``images``.

    "features": the mean squared difference from ``model``'s features (N, C, H, W) before global pooling,
    Eq. 31 of PRACTISE without adaptors. "answers": the mean over images of KL(p || q) in nats, p being the
    class probabilities of ``model`` and q those without the blocks. "response": the largest magnitude of
    what the block adds to its stream, over all images, channels and places; it is that of the block in the
    network without ``dropped``. Images are taken as they are, in eval mode.
    """
    original = trace(model, input_shape)
    base = apply(model, dropped, input_shape) if dropped != Plan() else original
    found = {residual.block.name: residual for residual in residuals(base)}
    blocks = [found[name] for name in names]
    totals = torch.zeros(len(blocks), dtype=torch.float64)
    with torch.inference_mode():
        for batch in _batches(base, images):
            if effect == "response":
                values = _Recorder(base).record(batch)
                largest = [float(values[_branch(base, block)].abs().amax()) for block in blocks]
                totals = torch.maximum(totals, totals.new_tensor(largest))
            else:
                totals += totals.new_tensor(_differences(original, base, blocks, batch, effect)) / len(images)
    return tuple(totals.nan_to_num(nan=LARGEST, posinf=LARGEST).tolist())


def _differences(
    original: fx.GraphModule,
    base: fx.GraphModule,
    blocks: Sequence[Residual],
    batch: torch.Tensor,
    effect: Literal["features", "answers"],
) -> list[float]:
    """For each block the sum over a batch's images of what dropping it makes different."""
    read: Callable[[fx.GraphModule], fx.Node] = feature_node if effect == "features" else _answer_node
    recorder = _Recorder(base)
    values = recorder.record(batch)
    wanted = (values if original is base else _Recorder(original).record(batch))[read(original)]
    end = read(base)
    compare = _feature_difference if effect == "features" else _divergence
    return [compare(recorder.without(block, values, end), wanted) for block in blocks]


def _feature_difference(own: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((own - wanted).square().flatten(1).mean(dim=1, dtype=torch.float64).sum())


def _divergence(own: torch.Tensor, wanted: torch.Tensor) -> float:
    own, wanted = F.log_softmax(own.double(), dim=1), F.log_softmax(wanted.double(), dim=1)
    return float(F.kl_div(own, wanted, reduction="sum", log_target=True))


class _Recorder(fx.Interpreter):
    """Runs a network and keeps every tensor; what would change one in place changes a copy."""

    def __init__(self, network: fx.GraphModule) -> None:
        super().__init__(network, garbage_collect_values=False)

    def record(self, batch: torch.Tensor) -> _Values:
        """What every node yields for a batch of images."""
        self.run(batch)
        return dict(self.env)

    def without(self, block: Residual, values: _Values, end: fx.Node) -> torch.Tensor:
        """What ``end`` yields where the block hands its stream on, all before it being as in ``values``."""
        self.env = {**values, block.add: values[block.stream]}
        changed = {block.add}
        for node in self.graph.nodes:
            if node.op != "output" and not changed.isdisjoint(node.all_input_nodes) and node not in changed:
                self.env[node] = self.run_node(node)
                changed.add(node)
        result: torch.Tensor = self.env[end]
        return result

    def call_function(
        self, target: Target, args: tuple[Argument, ...], kwargs: dict[str, Argument]
    ) -> object:
        name = getattr(target, "__name__", "")
        in_place = name in {"iadd", "imul", "isub", "itruediv"} or name.endswith("_")
        result: object = super().call_function(target, _copied(args) if in_place else args, kwargs)
        return result

    def call_method(self, target: Target, args: tuple[Argument, ...], kwargs: dict[str, Argument]) -> object:
        name = str(target)
        in_place = name.endswith("_") and not name.endswith("__")
        result: object = super().call_method(target, _copied(args) if in_place else args, kwargs)
        return result


def _copied(args: tuple[Argument, ...]) -> tuple[Argument, ...]:
    first, *others = args
    return (first.clone() if isinstance(first, torch.Tensor) else first, *others)


def _answer_node(traced: fx.GraphModule) -> fx.Node:
    """The node of the logits (N, classes)."""
    output: fx.Node = next(node for node in traced.graph.nodes if node.op == "output")
    return output.all_input_nodes[0]


def _branch(traced: fx.GraphModule, residual: Residual) -> fx.Node:
    """The operand of a droppable block's add that is not its stream."""
    stream = past_nothing(traced, residual.stream)
    return next(o for o in residual.add.all_input_nodes if past_nothing(traced, o) is not stream)


def _batches(traced: fx.GraphModule, images: Images) -> Iterator[torch.Tensor]:
    per_image = sum(torch.Size(shape(node) or (0,)).numel() for node in traced.graph.nodes) * 4
    size = max(1, min(MAX_BATCH, BATCH_BYTES // per_image))
    return (images.batch(slice(start, start + size)) for start in range(0, len(images), size))
