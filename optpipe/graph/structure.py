"""A key for what a network computes, whatever its parts are called and whatever its weights are."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import Any

import torch
from torch import fx, nn

from optpipe.graph.flow import past_nothing
from optpipe.graph.trace import module_of

_VERSION = "structure/1"
# How a module trains is no part of what it computes in inference.
_NOT_STRUCTURE = frozenset({"training", "inplace", "momentum"})


def structure_key(model: fx.GraphModule, input_shape: tuple[int, int, int], batch: int) -> str:
    """sha256 of the computation, as hexadecimal digits.

    It covers operations, module types with their hyper-parameters, shapes and types of parameters, the
    wiring by position, the input's shape and the batch. Names and weights have no part in it, nor has what
    does nothing in inference (dropout, identity). Sharing of one layer by two calls has.
    """
    position: dict[fx.Node, int] = {}
    owners: dict[int, int] = {}
    lines: list[Any] = [_VERSION, list(input_shape), batch]
    output = next(node for node in model.graph.nodes if node.op == "output")
    for node in _from_image(model, output):
        lines.append(_line(model, node, position, owners))
        position[node] = len(position)
    return hashlib.sha256(json.dumps(lines).encode()).hexdigest()


def _from_image(model: fx.GraphModule, output: fx.Node) -> Iterable[fx.Node]:
    """What the output needs, sources first, in the order in which it reads them."""
    done: set[fx.Node] = set()
    pending = [(output, False)]
    while pending:
        node, ready = pending.pop()
        if ready:
            yield node
        elif node not in done:
            done.add(node)
            pending.append((node, True))
            sources = [past_nothing(model, source) for source in node.all_input_nodes]
            pending.extend((source, False) for source in reversed(sources))


def _line(
    model: fx.GraphModule, node: fx.Node, position: dict[fx.Node, int], owners: dict[int, int]
) -> list[Any]:
    def encode(value: object) -> object:
        if isinstance(value, fx.Node):
            return {"node": position[past_nothing(model, value)]}
        if isinstance(value, tuple | list):
            return [encode(item) for item in value]
        if isinstance(value, dict):
            return {str(key): encode(item) for key, item in sorted(value.items())}
        return repr(value)

    module = module_of(model, node)
    if module is not None:
        owner = owners.setdefault(id(module), len(owners)) if list(module.parameters()) else None
        what: object = [_describe(module), owner]
    elif node.op == "get_attr":
        value = _attribute(model, str(node.target))
        what = [_tensor(value), owners.setdefault(id(value), len(owners))]
    elif node.op == "call_function":
        what = f"{getattr(node.target, '__module__', None)}.{getattr(node.target, '__name__', node.target)}"
    else:
        what = node.target if node.op == "call_method" else None
    args = None if node.op == "placeholder" else encode(node.args)
    return [node.op, what, args, encode(node.kwargs)]


def _describe(module: nn.Module) -> list[Any]:
    settings = {
        name: repr(value)
        for name, value in sorted(vars(module).items())
        if not name.startswith("_") and name not in _NOT_STRUCTURE and _is_plain(value)
    }
    own = [
        *module.named_parameters(recurse=False),
        *module.named_buffers(recurse=False),
    ]
    state = [[name, _tensor(tensor)] for name, tensor in own]
    children = [[name, _describe(child)] for name, child in module.named_children()]
    kind = type(module)
    return [f"{kind.__module__}.{kind.__qualname__}", settings, state, children]


def _is_plain(value: object) -> bool:
    if isinstance(value, tuple | list):
        return all(_is_plain(item) for item in value)
    return value is None or isinstance(value, bool | int | float | str | torch.dtype)


def _tensor(value: object) -> str:
    if isinstance(value, torch.Tensor):
        return f"{tuple(value.shape)} {value.dtype}"
    return repr(value)


def _attribute(model: fx.GraphModule, target: str) -> object:
    value: object = model
    for part in target.split("."):
        value = getattr(value, part)
    return value
