"""Which tensors of a network are quantized, written down as Q and DQ nodes."""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import onnx

from optpipe.errors import RunError
from optpipe.precision.network import LAYERS, Layer, Network, sort_nodes
from optpipe.precision.outcome import RESIDUAL

if TYPE_CHECKING:
    from numpy.typing import NDArray

SMALLEST_FP16_SCALE = 2.0**-14
"""The smallest normal number of fp16: below it a scale would lose bits, and some engines take it for 0."""


@dataclass(frozen=True, slots=True)
class Placement:
    """What stays in float: layers by their nodes' names, and unless ``residual`` all residual additions.

    With ``residual`` the shortcut of a residual addition is int8 and its branch is not, so that an engine
    can add the shortcut as it finishes the branch's convolution.
    """

    float_layers: frozenset[str] = frozenset()
    residual: bool = True

    def quantized(self, network: Network) -> tuple[Layer, ...]:
        """The layers that are quantized, in execution order."""
        return tuple(layer for layer in network.layers if layer.node not in self.float_layers)

    def in_float(self, network: Network) -> tuple[str, ...]:
        """What stays in float, as people call it."""
        found = tuple(layer.name for layer in network.layers if layer.node in self.float_layers)
        return found if self.residual or not network.additions else (*found, RESIDUAL)

    def tensors(self, network: Network) -> tuple[str, ...]:
        """The activations that need a range, each once."""
        names = [layer.input for layer in self.quantized(network)]
        if self.residual:
            names += [addition.shortcut for addition in network.additions]
        return tuple(dict.fromkeys(names))


def place(
    network: Network, thresholds: Mapping[str, float], placement: Placement, smallest_scale: float = 0.0
) -> onnx.ModelProto:
    """The network with Q and DQ before what is quantized, fp32 elsewhere and at its input and output.

    Activations and weights are int8 with zero point 0, weights with a scale for each output channel; biases
    stay in float, and outputs are quantized only where a quantized op reads them. ``thresholds`` holds the
    largest value to represent of each of the placement's tensors; no scale is below ``smallest_scale``.
    """
    from onnxruntime.quantization import QuantType
    from onnxruntime.quantization.calibrate import CalibrationMethod, TensorData, TensorsData
    from onnxruntime.quantization.qdq_quantizer import QDQQuantizer

    nodes = [layer.node for layer in placement.quantized(network)]
    if not nodes:
        return _copy(network.proto)
    if placement.residual:
        nodes += [addition.node for addition in network.additions]
    # The library asks for ranges of both inputs of an addition; those of the branch are dropped again below.
    ranges = dict.fromkeys((addition.branch for addition in network.additions), 1.0) | dict(thresholds)
    ops = [*LAYERS, "Add"]
    with _quiet(), _temporary_files():
        quantizer = QDQQuantizer(
            _copy(network.proto),
            per_channel=True,
            reduce_range=False,
            weight_qType=QuantType.QInt8,
            activation_qType=QuantType.QInt8,
            tensors_range=TensorsData(
                CalibrationMethod.MinMax,
                {
                    name: TensorData(lowest=np.array(-value, np.float32), highest=np.array(value, np.float32))
                    for name, value in ranges.items()
                },
            ),
            nodes_to_quantize=nodes,
            nodes_to_exclude=[],
            op_types_to_quantize=ops,
            extra_options={
                "ActivationSymmetric": True,
                "WeightSymmetric": True,
                "QuantizeBias": False,
                "OpTypesToExcludeOutputQuantization": ops,
                # The library widens the range of what is symmetric from one end only: twice it is safe.
                "MinimumRealRange": 2 * 127 * smallest_scale or None,
            },
        )
        quantizer.quantize_model()
    proto: onnx.ModelProto = quantizer.model.model
    _read_float(proto, network, placement)
    _prune(proto.graph)
    sort_nodes(proto.graph)
    del proto.metadata_props[:]
    return proto


def weights(proto: onnx.ModelProto, layers: Collection[Layer]) -> dict[str, NDArray[np.float32]]:
    """The dequantized weight of each layer that is quantized, by its node's name."""
    values = {tensor.name: tensor for tensor in proto.graph.initializer}
    producers = {name: node for node in proto.graph.node for name in node.output}
    found = {}
    for node in proto.graph.node:
        if node.name not in {layer.node for layer in layers}:
            continue
        dequantize = producers.get(node.input[1])
        if dequantize is None or dequantize.input[0] not in values:
            continue
        integers, scale = (onnx.numpy_helper.to_array(values[name]) for name in dequantize.input[:2])
        axis = next((entry.i for entry in dequantize.attribute if entry.name == "axis"), 1)
        shape = [1] * integers.ndim
        if scale.ndim:
            shape[axis] = -1
        found[node.name] = (integers.astype(np.float32) * scale.reshape(shape)).astype(np.float32)
    return found


def scales(proto: onnx.ModelProto) -> dict[str, float]:
    """The scale of each quantized activation."""
    values = {tensor.name: tensor for tensor in proto.graph.initializer}
    return {
        node.input[0]: float(onnx.numpy_helper.to_array(values[node.input[1]]))
        for node in proto.graph.node
        if node.op_type == "QuantizeLinear"
    }


def _read_float(proto: onnx.ModelProto, network: Network, placement: Placement) -> None:
    """Let the ops that are not to read quantized values read the float ones."""
    producers = {name: node for node in proto.graph.node for name in node.output}
    quantized = {layer.node for layer in placement.quantized(network)}
    branches = {addition.node: addition.branch for addition in network.additions}
    for node in proto.graph.node:
        if node.name in quantized or node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            continue
        for index, name in enumerate(node.input):
            dequantize = producers.get(name)
            if dequantize is None or dequantize.op_type != "DequantizeLinear":
                continue
            quantize = producers.get(dequantize.input[0])
            raw = quantize.input[0] if quantize is not None else ""
            if raw and (not placement.residual or branches.get(node.name) == raw):
                node.input[index] = raw


def _prune(graph: onnx.GraphProto) -> None:
    """Take out nodes and initializers that nothing reads."""
    while True:
        read = {name for node in graph.node for name in node.input} | {value.name for value in graph.output}
        unread = [node for node in graph.node if not read.intersection(node.output)]
        if not unread:
            break
        for node in unread:
            graph.node.remove(node)
    for tensor in [tensor for tensor in graph.initializer if tensor.name not in read]:
        graph.initializer.remove(tensor)


def _copy(proto: onnx.ModelProto) -> onnx.ModelProto:
    copied = onnx.ModelProto()
    copied.CopyFrom(proto)
    return copied


@contextlib.contextmanager
def _temporary_files() -> Iterator[None]:
    """The library goes by way of temporary files; RunError where it has no permission to remove them.

    Python's own temporary folders then recurse without end.
    """
    try:
        yield
    except RecursionError:
        raise RunError(
            f"{tempfile.gettempdir()}: temporary files cannot be removed there; set TMPDIR to a folder that "
            "is yours"
        ) from None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hold back what the library prints and logs; its failures are exceptions."""
    before = logging.root.manager.disable
    try:
        logging.disable(logging.CRITICAL)
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(before)
