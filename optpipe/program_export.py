"""torch to a ``torch.export`` program: what ahead-of-time compilers for torch build from."""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import operator
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import cast

import torch
from torch import fx, nn

from optpipe import leftovers
from optpipe.errors import RunError, lacks_memory
from optpipe.files import write_atomically

_CONVOLUTIONS = {torch.ops.aten.conv1d.default, torch.ops.aten.conv2d.default, torch.ops.aten.conv2d.padding}
_TRACES = ("stack_trace", "nn_module_stack", "source_fn_stack", "torch_fn", "from_node")


def export(model: nn.Module, input_shape: Sequence[int], batch: int, path: Path) -> None:
    """Write ``model`` in eval mode and fp32 as a program of one batch; ``input_shape`` is (C, H, W).

    Batch-norm is folded into the convolutions: compilers that could do so leave it standing in programs that
    were exported. Stack traces and local paths are left out. ``model`` is unchanged and the file appears
    whole or not at all. The program takes contiguous images. Raises RunError where torch cannot export the
    network or the file cannot be written.
    """
    network = copy.deepcopy(model).eval().cpu().float().requires_grad_(False)
    images = torch.zeros(batch, *input_shape)
    try:
        with _quiet(), torch.no_grad():
            traced = torch.export.export(network, (images,)).module(check_guards=False)
            _fold_batch_norm(traced)
            program = torch.export.export(traced, (images,))
            _strip(program.graph_module)
            content = io.BytesIO()
            torch.export.save(program, content)
            leftovers.forget(program)
    except Exception as error:  # tracing runs the network's own forward, which may raise anything
        if lacks_memory(error):
            raise
        raise RunError(
            f"torch cannot export {type(model).__name__} to a program: {_first_line(error)}; "
            "its forward must be free of branches on data"
        ) from error
    write_atomically(path, content.getvalue())


def _fold_batch_norm(traced: fx.GraphModule) -> None:
    """Fold each batch-norm that reads a convolution's output, as nothing else does, into it.

    With running mean m and variance v, gain g and offset b, W' = W g / sqrt(v + eps) by output channel and
    b' = b + (bias - m) g / sqrt(v + eps), in double precision.
    """
    target = torch.ops.aten.batch_norm.default
    for number, norm in enumerate(traced.graph.find_nodes(op="call_function", target=target)):
        convolution, gain, offset, mean, variance, training, _, epsilon, *_ = norm.args
        if convolution.target not in _CONVOLUTIONS or len(convolution.users) > 1 or training:
            continue
        arguments = list(convolution.args)
        images, weight, bias, *others = arguments + [None] * (3 - len(arguments))
        if not all(node is None or node.op == "get_attr" for node in (weight, bias, gain, offset, mean)):
            continue  # a weight that is computed is not known here
        kernel = _value(traced, weight, 0.0)
        scale = (_value(traced, variance, 1.0) + epsilon).rsqrt() * _value(traced, gain, 1.0)
        shift = (_value(traced, bias, 0.0) - _value(traced, mean, 0.0)) * scale + _value(traced, offset, 0.0)
        nodes = []
        with traced.graph.inserting_before(convolution):
            for name, tensor in (
                ("weight", kernel * scale.reshape(-1, *[1] * (kernel.dim() - 1))),
                ("bias", shift),
            ):
                traced.register_buffer(f"folded{number}_{name}", tensor.float())
                nodes.append(traced.graph.get_attr(f"folded{number}_{name}"))
        convolution.args = (images, *nodes, *others)
        norm.replace_all_uses_with(convolution)
        traced.graph.erase_node(norm)
    traced.graph.eliminate_dead_code()
    traced.delete_all_unused_submodules()
    traced.recompile()


def _value(traced: fx.GraphModule, node: fx.Node | None, otherwise: float) -> torch.Tensor:
    """The weight that a node reads, as float64; ``otherwise`` where there is none."""
    if node is None:
        return torch.tensor(otherwise, dtype=torch.float64)
    return cast(torch.Tensor, operator.attrgetter(str(node.target))(traced)).double()


def _strip(graph_module: fx.GraphModule) -> None:
    """Take out what the exporter notes for its own debugging, local paths among it."""
    for node in graph_module.graph.nodes:
        for trace in _TRACES:
            node.meta.pop(trace, None)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hold back what the exporter logs and warns of; its failures are exceptions."""
    logger = logging.getLogger("torch.export")
    level = logger.level
    try:
        logger.setLevel(logging.CRITICAL)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _first_line(error: BaseException) -> str:
    text = str(error.__cause__ or error).strip()
    return text.splitlines()[0] if text else type(error).__name__
