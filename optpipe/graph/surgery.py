"""Taking units of depth and channels out of a traced network."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import TypeVar

import torch.nn.functional as F
from torch import fx, nn

from optpipe.errors import UsageError
from optpipe.graph.blocks import Residual, Unit
from optpipe.graph.dense import carriers, concatenated, readers
from optpipe.graph.flow import relu_ceiling
from optpipe.graph.resolution import check_size, image_shape
from optpipe.graph.trace import module_of, propagate, trace
from optpipe.graph.units import depth_units
from optpipe.graph.widths import Removed, narrow, removals
from optpipe.types import Plan


def apply(model: nn.Module, plan: Plan, input_shape: tuple[int, int, int]) -> fx.GraphModule:
    """The candidate: a copy of ``model`` without the plan's units of depth and channels.

    It equals the original with the branches of residual blocks at zero, with plain units handing on what
    they read, and with the channels that go, those of dense layers among them, at zero where convolutions
    and linear layers read them. Units and groups are named as in the original. The units go first, then the
    channels of whatever is left: where all of a group's layers went with a unit, its entry changes nothing.
    State_dict keys are the original's without those of the dropped units. Shapes are known at
    ``image_shape(plan, input_shape)``, which is what the candidate is to be traced with from then on.
    Raises UsageError for a unit or group that does not exist or cannot be dropped or narrowed, for channels
    that are no ascending choice of the group's, and for an image size that the network does not take.
    """
    traced = trace(model, input_shape)
    image = image_shape(plan, input_shape)
    if image != input_shape:
        check_size(traced, image)
    dropped = _droppable(depth_units(traced), plan.drop_blocks)
    plain, dense, residual = (_of_kind(dropped, kind) for kind in ("plain", "dense", "residual"))
    removed = _removals_without(traced, plain, plan.keep_channels, input_shape)
    for path, lost in _lost(traced, dense).items():
        layer = removed.setdefault(path, Removed())
        layer.outputs |= lost.outputs
        layer.inputs |= lost.inputs
    inside = frozenset[fx.Node]().union(*(unit.region for unit in dense))
    drop(traced, [unit for unit in residual if unit.end not in inside])  # the others go with a dense layer
    if removed or dense:
        narrow(traced, removed, input_shape, (lambda: _leave(traced, dense)) if dense else None)
    propagate(traced, image)
    return traced


def chosen(found: list[Residual], plan: Plan) -> list[Residual]:
    """The residual blocks of a plan that drops nothing else, in execution order.

    Raises UsageError for a plan that does more, and for a block that is unknown, of another kind, or not
    droppable.
    """
    if plan.keep_channels or plan.input_hw is not None:
        raise UsageError("this plan narrows channels or changes the resolution; only drop_blocks is applied")
    return _droppable(found, plan.drop_blocks)


_AnyUnit = TypeVar("_AnyUnit", Residual, Unit)


def _droppable(found: list[_AnyUnit], names: tuple[str, ...]) -> list[_AnyUnit]:
    known = {unit.block.name: unit for unit in found}
    what = "residual block" if all(unit.block.kind == "residual" for unit in found) else "unit of depth"
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
            hint = f"did you mean {near[0]!r}?" if near else f"the network has no {what}"
            raise UsageError(f"no {what} is named {name!r}; {hint}")
        if not known[name].block.droppable:
            raise UsageError(f"block {name!r} cannot be dropped: {known[name].block.why_not}")
    return [unit for unit in found if unit.block.name in names]


def _of_kind(units: list[Unit], kind: str) -> list[Unit]:
    return [unit for unit in units if unit.block.kind == kind]


def _removals_without(
    traced: fx.GraphModule,
    plain: list[Unit],
    keep: Sequence[tuple[str, tuple[int, ...]]],
    input_shape: tuple[int, int, int],
) -> dict[str, Removed]:
    """What each layer loses by these widths once the plain units are taken out of ``traced``, as this does.

    What read a plain unit reads the layer before it then, and loses that layer's channels.
    """
    gone = {str(node.target) for unit in plain for node in unit.region}
    void = [entry for entry in keep if entry[0] in gone]
    if void:  # they change nothing, but a mistake in them is still one
        removals(traced, void, input_shape)
    if plain:
        drop(traced, plain)
    return removals(traced, [entry for entry in keep if entry[0] not in gone], input_shape)


def _lost(traced: fx.GraphModule, dense: list[Unit]) -> dict[str, Removed]:
    """What the readers of dense layers lose with all of these."""
    lost = readers(traced, {unit.features for unit in dense if unit.features is not None})
    if isinstance(lost, str):
        names = ", ".join(repr(unit.block.name) for unit in dense)
        raise UsageError(f"blocks {names} cannot be dropped together: {lost}")
    return lost


def drop(traced: fx.GraphModule, dropped: Sequence[Residual | Unit]) -> None:
    """Take residual and plain units out of ``traced`` itself, and with them all that only they used."""
    # A stream can be the end of a unit that is dropped before it.
    standing: dict[fx.Node, fx.Node] = {}
    for unit in dropped:
        stream = standing.get(unit.stream, unit.stream)
        reading = list(unit.end.users)
        unit.end.replace_all_uses_with(stream)
        standing[unit.end] = stream
        erase(traced, unit.end)
        for reader in reading:
            removed = _skip_second_relu(traced, reader)
            if removed is not None:
                standing[reader] = removed
    discard_unused(traced)


def _leave(traced: fx.GraphModule, dropped: Sequence[Unit]) -> None:
    """Take dense layers out of ``traced`` itself: their features leave every concatenation."""
    for features in (unit.features for unit in dropped):
        if features is None or features not in set(traced.graph.nodes):  # it went with a unit around it
            continue
        handed_on = carriers(traced, features)
        for node in list(traced.graph.nodes):
            joined = concatenated(node) or ()
            if handed_on.intersection(joined):
                _join(traced, node, [source for source in joined if source not in handed_on])
        for node in reversed([node for node in traced.graph.nodes if node in handed_on]):
            if node in set(traced.graph.nodes):
                erase(traced, node)
    discard_unused(traced)


def _join(traced: fx.GraphModule, joining: fx.Node, left: list[fx.Node]) -> None:
    """Let a concatenation join these alone; one of a single map is that map."""
    if not left:
        raise UsageError(
            f"nothing would be left for {joining.name} to concatenate; keep one dense layer more"
        )
    if len(left) == 1:
        joining.replace_all_uses_with(left[0])
        erase(traced, joining)
    elif joining.args:
        joining.args = (left, *joining.args[1:])
    else:
        joining.kwargs = {**joining.kwargs, "tensors": left}


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
