"""Taking blocks and channels out of a traced network."""

from __future__ import annotations

import difflib

import torch.nn.functional as F
from torch import fx, nn

from optpipe.errors import UsageError
from optpipe.graph.blocks import Residual, residuals
from optpipe.graph.flow import relu_ceiling
from optpipe.graph.trace import module_of, propagate, trace
from optpipe.graph.widths import narrow, removals
from optpipe.types import Plan


def apply(model: nn.Module, plan: Plan, input_shape: tuple[int, int, int]) -> fx.GraphModule:
    """The candidate: a copy of ``model`` without the plan's blocks and channels.

    It equals the original with the branches of those blocks at zero, and with those channels at zero where
    they are read. Blocks and groups are named as in the original. The blocks go first, then the channels
    of whatever is left: where all of a group's layers went with a block, its entry changes nothing.
    State_dict keys are the original's without those of the dropped blocks.
    Raises UsageError for a block or group that does not exist or cannot be dropped or narrowed, and for
    channels that are no ascending choice of the group's.
    """
    if plan.input_hw is not None:
        raise UsageError("this plan changes the resolution; only drop_blocks and keep_channels are applied")
    traced = trace(model, input_shape)
    dropped = _droppable(residuals(traced), plan.drop_blocks)
    removed = removals(traced, plan.keep_channels, input_shape)
    drop(traced, dropped)
    if removed:
        narrow(traced, removed, input_shape)
    propagate(traced, input_shape)
    return traced


def chosen(found: list[Residual], plan: Plan) -> list[Residual]:
    """The blocks of a plan that drops nothing else, in execution order.

    Raises UsageError for a plan that does more, and for a block that is unknown or not droppable.
    """
    if plan.keep_channels or plan.input_hw is not None:
        raise UsageError("this plan narrows channels or changes the resolution; only drop_blocks is applied")
    return _droppable(found, plan.drop_blocks)


def _droppable(found: list[Residual], names: tuple[str, ...]) -> list[Residual]:
    known = {residual.block.name: residual for residual in found}
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
            hint = f"did you mean {near[0]!r}?" if near else "the network has no residual block"
            raise UsageError(f"no residual block is named {name!r}; {hint}")
        if not known[name].block.droppable:
            raise UsageError(f"block {name!r} cannot be dropped: {known[name].block.why_not}")
    return [residual for residual in found if residual.block.name in names]


def drop(traced: fx.GraphModule, dropped: list[Residual]) -> None:
    """Take blocks out of ``traced`` itself, and with them all that only they used."""
    # A stream can be the add of a block that is dropped before it.
    standing: dict[fx.Node, fx.Node] = {}
    for residual in dropped:
        stream = standing.get(residual.stream, residual.stream)
        readers = list(residual.add.users)
        residual.add.replace_all_uses_with(stream)
        standing[residual.add] = stream
        erase(traced, residual.add)
        for reader in readers:
            removed = _skip_second_relu(traced, reader)
            if removed is not None:
                standing[reader] = removed
    discard_unused(traced)


def _skip_second_relu(traced: fx.GraphModule, node: fx.Node) -> fx.Node | None:
    """Take out a ReLU whose input is a ReLU's output already; what stands for it then, None if it stays."""
    ceiling = relu_ceiling(traced, node)
    if ceiling is None:
        return None
    source = before = node.all_input_nodes[0]
    while _keeps_range(traced, before):
        before = before.all_input_nodes[0]
    earlier = relu_ceiling(traced, before)
    if earlier is None or earlier > ceiling:
        return None
    node.replace_all_uses_with(source)
    erase(traced, node)
    return source


def _keeps_range(traced: fx.GraphModule, node: fx.Node) -> bool:
    module = module_of(traced, node)
    return isinstance(module, nn.MaxPool2d | nn.Identity | nn.modules.dropout._DropoutNd) or (
        node.op == "call_function" and node.target is F.max_pool2d
    )


def erase(traced: fx.GraphModule, node: fx.Node) -> None:
    """Take out a node that nothing reads, then those that only it had read.

    Not fx's elimination of dead code: that would also take an in-place call whose result nothing reads.
    """
    pending, gone = [node], set[fx.Node]()
    while pending:
        last = pending.pop()
        if last.users or last.op in {"placeholder", "output"} or last in gone:
            continue
        gone.add(last)
        sources = last.all_input_nodes
        traced.graph.erase_node(last)
        pending.extend(sources)


def discard_unused(traced: fx.GraphModule) -> None:
    """Delete the modules, parameters and buffers that the graph no longer uses, and recompile."""
    traced.delete_all_unused_submodules()
    used = {str(node.target) for node in traced.graph.nodes if node.op in {"get_attr", "call_module"}}
    held = [*dict(traced.named_parameters()), *dict(traced.named_buffers())]
    for path in held:
        parts = path.split(".")
        if not any(".".join(parts[:end]) in used for end in range(1, len(parts) + 1)):
            delattr(traced.get_submodule(".".join(parts[:-1])), parts[-1])
    traced.graph.lint()
    traced.recompile()
