"""A network as a torch.fx graph whose nodes know their shapes, and what it counts.

Every node that yields one tensor carries its shape for one image as ``node.meta["shape"]``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torchvision.ops import stochastic_depth

from optpipe.errors import UsageError

# Subclasses of these stay whole: a batch-norm that is traced through would have the mode it was traced in
# for ever, and a convolution that pads by the size of its input cannot be traced at all.
_WHOLE = (nn.modules.batchnorm._BatchNorm, nn.Conv2d, nn.Linear)

# Outside training these return their input; a traced call carries its mode, at this position, for ever.
_MODE_AT = {
    F.dropout: 2,
    F.dropout1d: 2,
    F.dropout2d: 2,
    F.dropout3d: 2,
    F.alpha_dropout: 2,
    stochastic_depth: 3,
}


class _Tracer(fx.Tracer):
    """Symbolic tracing that remembers in which module it failed."""

    failed_in: str | None = None

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, _WHOLE) or super().is_leaf_module(m, module_qualified_name)

    def call_module(
        self,
        m: nn.Module,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception:
            if self.failed_in is None:
                self.failed_in = f"{self.path_of_module(m)} ({type(m).__name__})"
            raise


class _Shapes(fx.Interpreter):
    """Runs the graph once and keeps every tensor's shape and the node it had come to."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.extra_traceback = False
        self.at = ""

    def run_node(self, n: fx.Node) -> Any:
        self.at = str(n.target) if n.op == "call_module" else n.name
        value = super().run_node(n)
        n.meta.pop("shape", None)
        n.meta["computed"] = n.op != "get_attr" and _holds_tensor(value)
        if isinstance(value, torch.Tensor):
            n.meta["shape"] = tuple(value.shape)
        return value


def _holds_tensor(value: object) -> bool:
    if isinstance(value, dict):
        value = tuple(value.values())
    return isinstance(value, torch.Tensor) or (
        isinstance(value, tuple | list) and any(_holds_tensor(item) for item in value)
    )


def trace(model: nn.Module, input_shape: tuple[int, int, int]) -> fx.GraphModule:
    """A traced deep copy of ``model`` in eval mode, its nodes' shapes taken for one image (C, H, W).

    A GraphModule is copied and its shapes are taken anew. Activations stop working in place: once a block
    is dropped, an in-place one could change a stream that others read.
    Raises UsageError where torch.fx cannot trace the model or the model refuses an image of this shape.
    """
    traced = copy.deepcopy(model).eval()
    if not isinstance(traced, fx.GraphModule):
        traced = _symbolic(traced)
    _settle(traced)
    propagate(traced, input_shape)
    return traced


def _symbolic(model: nn.Module) -> fx.GraphModule:
    tracer = _Tracer()
    kind = type(model).__name__
    try:
        graph = tracer.trace(model)
    except Exception as error:  # the model's own code runs here, so anything can be raised
        where = f" in {tracer.failed_in}" if tracer.failed_in else ""
        raise UsageError(
            f"torch.fx cannot trace {kind}{where}: {_first_line(error)}; make its forward free of branches "
            "and loops that depend on a tensor's values, or wrap that part with torch.fx.wrap"
        ) from error
    inputs = [node.name for node in graph.nodes if node.op == "placeholder"]
    for node in [n for n in graph.nodes if n.op == "placeholder"][1:]:
        if node.args or not node.users:  # an optional argument that stays at its default
            continue
        raise UsageError(
            f"{kind} takes {len(inputs)} inputs ({', '.join(inputs)}); give a model of images alone"
        )
    return fx.GraphModule(model, graph, kind)


def _settle(traced: fx.GraphModule) -> None:
    """Take out what does nothing in eval mode and every ``inplace``."""
    for node in list(traced.graph.nodes):
        if node.op == "call_function" and node.target in _MODE_AT and not _is_training(node):
            node.replace_all_uses_with(node.args[0])
            traced.graph.erase_node(node)
        elif node.op == "call_function" and node.kwargs.get("inplace"):
            node.kwargs = {**node.kwargs, "inplace": False}
    for module in traced.modules():
        if getattr(module, "inplace", False) is True:
            vars(module)["inplace"] = False
    traced.recompile()


def _is_training(dropout: fx.Node) -> bool:
    at = _MODE_AT[dropout.target]
    given = dropout.args[at] if len(dropout.args) > at else dropout.kwargs.get("training", True)
    return given is not False


def propagate(traced: fx.GraphModule, input_shape: tuple[int, int, int]) -> None:
    """Set ``node.meta["shape"]`` on every node of a module in eval mode, by running one black image."""
    like = next((p for p in traced.parameters() if p.is_floating_point()), torch.zeros(()))
    run = _Shapes(traced)
    try:
        with torch.no_grad():
            run.run(torch.zeros(1, *input_shape, device=like.device, dtype=like.dtype))
    except (RuntimeError, ValueError, TypeError, IndexError, AssertionError) as error:
        raise UsageError(
            f"{type(traced).__name__} does not take an image of shape {input_shape}: "
            f"at {run.at}: {_first_line(error)}; set the shape that the model was made for"
        ) from error


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0].split(". ")[0] if text else type(error).__name__


def shape(node: fx.Node) -> tuple[int, ...] | None:
    """Shape of the tensor that a node yields, batch first; None if it yields no tensor."""
    found: tuple[int, ...] | None = node.meta.get("shape")
    return found


def module_of(traced: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    """The module that a node calls; None for any other node."""
    return traced.get_submodule(str(node.target)) if node.op == "call_module" else None


def is_computed(node: fx.Node) -> bool:
    """Whether a node yields a tensor, or several, that is computed: no parameter, no size."""
    return bool(node.meta.get("computed", False))


def tensor_inputs(node: fx.Node) -> list[fx.Node]:
    """The nodes whose computed tensors a node reads."""
    return [source for source in node.all_input_nodes if is_computed(source)]


def node_macs(traced: fx.GraphModule, node: fx.Node) -> int:
    """Multiply-accumulates of one convolution or linear node for one image; 0 for any other node."""
    out, module = shape(node), module_of(traced, node)
    if out is None:
        return 0
    weight: tuple[int, ...] | None = None
    if isinstance(module, nn.modules.conv._ConvNd | nn.Linear):
        weight = tuple(module.weight.shape)
    elif node.target in {F.conv1d, F.conv2d, F.conv3d, torch.conv2d, F.linear}:
        sources = [*node.args, node.kwargs.get("weight")]
        where = sources[1] if len(node.args) > 1 else sources[-1]
        weight = shape(where) if isinstance(where, fx.Node) else None
    if weight is None:
        return 0
    if isinstance(module, nn.modules.conv._ConvTransposeNd):
        out = shape(tensor_inputs(node)[0]) or ()
    # Each element of the output (of the input, transposed) meets one filter: weight[0].
    return torch.Size(out).numel() // out[0] * torch.Size(weight[1:]).numel()


def count(model: fx.GraphModule, input_shape: tuple[int, int, int]) -> tuple[int, int]:
    """(parameters, MACs of one image); MACs are those of convolution and linear layers."""
    traced = trace(model, input_shape)
    return total(traced)


def total(traced: fx.GraphModule) -> tuple[int, int]:
    """(parameters, MACs of one image) of a module whose shapes are known."""
    parameters = sum(parameter.numel() for parameter in traced.parameters())
    return parameters, sum(node_macs(traced, node) for node in traced.graph.nodes)
