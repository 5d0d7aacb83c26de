"""What a unit of depth is, and the residual blocks of a traced graph, found from its adds, not from names."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from torch import fx, nn

from optpipe.graph.flow import add_operands, dominators, is_feature_map, past_nothing
from optpipe.graph.trace import is_computed, module_of, node_macs, shape
from optpipe.types import Block


@dataclass(frozen=True, slots=True)
class Residual:
    """A residual block and where it lies: ``region`` is all that runs between the stream and the add."""

    block: Block
    stream: fx.Node
    add: fx.Node
    region: frozenset[fx.Node]

    @property
    def end(self) -> fx.Node:
        """The node that yields the stream after the block."""
        return self.add


@dataclass(frozen=True, slots=True)
class Unit:
    """A unit of depth of any kind and where it lies.

    It reads ``stream``; ``end`` yields the stream after it: the add of a residual block, the concatenation
    that takes in a dense layer's ``features``, the activation of a plain unit. ``region`` is all that runs
    for this unit alone. ``features`` is None but for a dense layer.
    """

    block: Block
    stream: fx.Node
    end: fx.Node
    region: frozenset[fx.Node]
    features: fx.Node | None = None


def residuals(traced: fx.GraphModule) -> list[Residual]:
    """Every residual block in execution order.

    A block is an add of two feature maps of equal shape; its stream is the nearest node that all paths to
    both pass through. It is droppable where the stream itself is one of the two and nothing else reads the
    other on its way.
    """
    immediate = dominators(traced.graph)
    found: list[tuple[fx.Node, fx.Node, frozenset[fx.Node], bool]] = []
    for add in traced.graph.nodes:
        operands, stream = add_operands(add), immediate[add]
        if operands is None or stream is None or not is_feature_map(stream):
            continue
        region = between(stream, add)
        identity = any(past_nothing(traced, operand) is past_nothing(traced, stream) for operand in operands)
        if any(node_macs(traced, node) for node in region):
            found.append((add, stream, region, identity))
    names = _names(traced, [(add, region) for add, _, region, _ in found])
    return [
        Residual(_block(traced, name, stream, add, region, identity), stream, add, region)
        for name, (add, stream, region, identity) in zip(names, found, strict=True)
    ]


def between(stream: fx.Node, end: fx.Node) -> frozenset[fx.Node]:
    """What ``end`` is computed by from ``stream``, both left out."""
    region: set[fx.Node] = set()
    pending = [end]
    while pending:
        for source in pending.pop().all_input_nodes:
            # A size may be taken from before the stream; what made it is no part of the block.
            part = is_computed(source) or source.op == "get_attr"
            if part and source is not stream and source not in region:
                region.add(source)
                pending.append(source)
    return frozenset(node for node in region if node.op not in {"placeholder", "output"})


def _block(
    traced: fx.GraphModule,
    name: str,
    stream: fx.Node,
    add: fx.Node,
    region: frozenset[fx.Node],
    identity: bool,
) -> Block:
    before, after = (shape(stream) or ())[1:], (shape(add) or ())[1:]
    leaks = any(goes_on(user) for node in region for user in node.users if user not in region | {add})
    if identity:
        why_not = "a part of its branch is used elsewhere too" if leaks else ""
    elif before != after:
        why_not = f"changes the shape {before} -> {after}"
    else:
        why_not = "its shortcut is a projection"
    return Block(
        name=name,
        input_shape=before,
        output_shape=after,
        parameters=parameters_of(traced, region),
        macs=sum(node_macs(traced, node) for node in region),
        droppable=not why_not,
        why_not=why_not,
    )


def goes_on(node: fx.Node) -> bool:
    """Whether a tensor goes on through ``node``: it is no mere size, and something reads it."""
    return is_computed(node) and (node.op == "output" or bool(node.users))


def parameters_of(traced: fx.GraphModule, region: frozenset[fx.Node]) -> int:
    """Parameters that a region alone uses."""
    users: dict[nn.Parameter, bool] = {}
    for node in traced.graph.nodes:
        if node.op == "call_module":
            used = list(traced.get_submodule(str(node.target)).parameters())
        elif node.op == "get_attr":
            value = _attribute(traced, str(node.target))
            used = [value] if isinstance(value, nn.Parameter) else []
        else:
            continue
        for parameter in used:
            users[parameter] = users.get(parameter, True) and node in region
    return sum(parameter.numel() for parameter, inside in users.items() if inside)


def _attribute(traced: fx.GraphModule, target: str) -> object:
    value: object = traced
    for part in target.split("."):
        value = getattr(value, part)
    return value


def _names(traced: fx.GraphModule, found: list[tuple[fx.Node, frozenset[fx.Node]]]) -> list[str]:
    """A unique name for each: the module that adds, else the one that holds the branch, else the node."""
    candidates = [(_adding_module(add), holding_module(traced, region), add.name) for add, region in found]
    names = [adding or holding or node for adding, holding, node in candidates]
    for level in (1, 2):
        often = Counter(names)
        names = [
            (choice[level] or choice[2]) if often[name] > 1 else name
            for name, choice in zip(names, candidates, strict=True)
        ]
    return names


def _adding_module(add: fx.Node) -> str:
    stack = list(add.meta.get("nn_module_stack", {}).values())
    return str(stack[-1][0]) if stack else ""


def holding_module(traced: fx.GraphModule, region: frozenset[fx.Node]) -> str:
    """The path of the innermost module that holds all that a region calls; "" where it is the network."""
    paths = [str(node.target).split(".") for node in region if module_of(traced, node) is not None]
    if not paths:
        return ""
    # Paths between the least and the greatest begin with whatever those two have in common.
    low, high = min(paths), max(paths)
    same = 0
    while same < min(len(low), len(high)) and low[same] == high[same]:
        same += 1
    return ".".join(low[:same])
