"""A network in fp16 with fp32 inputs and outputs, and fp32 where fp16 would overflow."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np
import onnx

from optpipe.errors import RunError
from optpipe.precision.network import LAYERS, Network, sort_nodes

LARGEST = float(np.finfo(np.float16).max)
_HALF_OF_SMALLEST = 2.0**-25


def overflowing(proto: onnx.ModelProto, peaks: Mapping[str, float], margin: float) -> tuple[str, ...]:
    """The nodes that must stay in fp32, in execution order.

    A node stays that writes or reads a tensor whose peak times ``margin`` does not fit into fp16, or has a
    weight that does not. ``peaks`` holds largest absolute values of activations; what it lacks is taken to
    fit. Q and DQ nodes are as large as what they quantize.
    """
    too_large = {name for name, peak in peaks.items() if peak * margin > LARGEST}
    for tensor in proto.graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT:
            values = onnx.numpy_helper.to_array(tensor)
            if values.size and np.abs(values).max() > LARGEST:
                too_large.add(tensor.name)
    found = []
    for node in proto.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear") and node.input[0] in too_large:
            too_large.update(node.output)
        if too_large.intersection((*node.input, *node.output)):
            found.append(node.name)
    return tuple(found)


def to_fp16(proto: onnx.ModelProto, keep: Collection[str]) -> onnx.ModelProto:
    """The network in fp16, the nodes named in ``keep`` in fp32; inputs and outputs are fp32.

    Weights of layers too small for fp16 become 0. Raises RunError where the graph cannot be converted.
    """
    from onnxruntime.transformers.float16 import convert_float_to_float16

    copied = onnx.ModelProto()
    copied.CopyFrom(proto)
    quantized = any(node.op_type == "QuantizeLinear" for node in copied.graph.node)
    opset = max(entry.version for entry in copied.opset_import if entry.domain in ("", "ai.onnx"))
    if quantized and opset < 19:
        raise RunError(f"quantizing fp16 values needs ONNX opset 19, the file has {opset}: export it anew")
    _flush(copied.graph)
    converted: onnx.ModelProto = convert_float_to_float16(
        copied, keep_io_types=True, node_block_list=list(keep)
    )
    graph = converted.graph
    _drop_round_trips(graph)
    sort_nodes(graph)
    del graph.value_info[:]
    del converted.metadata_props[:]
    return converted


def _flush(graph: onnx.GraphProto) -> None:
    """Round layers' weights below half of fp16's smallest number to 0, where the library rounds away from it.

    Other constants may be divided by, and stay above 0.
    """
    weights = {name for node in graph.node if node.op_type in LAYERS for name in node.input[1:]}
    for tensor in graph.initializer:
        if tensor.name in weights and tensor.data_type == onnx.TensorProto.FLOAT:
            values = onnx.numpy_helper.to_array(tensor)
            tiny = np.abs(values) < _HALF_OF_SMALLEST
            if (tiny & (values != 0)).any():
                tensor.CopyFrom(
                    onnx.numpy_helper.from_array(np.where(tiny, np.float32(0), values), tensor.name)
                )


def _drop_round_trips(graph: onnx.GraphProto) -> None:
    """Take out casts from fp32 to fp16 and back, which neighbours kept in fp32 would else exchange.

    They are not only slow: what overflows fp16 is infinite after them.
    """
    down = {node.output[0]: node.input[0] for node in graph.node if _casts_to(node, onnx.TensorProto.FLOAT16)}
    outputs = {value.name for value in graph.output}
    sources = {
        node.output[0]: down[node.input[0]]
        for node in graph.node
        if _casts_to(node, onnx.TensorProto.FLOAT) and node.input[0] in down
    }
    # A round trip that ends in an output: whoever writes its beginning writes the output instead.
    renamed = {source: name for name, source in sources.items() if name in outputs}
    for node in list(graph.node):
        if node.output[0] in sources:
            graph.node.remove(node)
            continue
        for index, name in enumerate(node.output):
            node.output[index] = renamed.get(name, name)
        for index, name in enumerate(node.input):
            source = sources.get(name, name)
            node.input[index] = renamed.get(source, source)
    read = {name for node in graph.node for name in node.input} | outputs
    for node in [node for node in graph.node if node.op_type == "Cast" and node.output[0] not in read]:
        graph.node.remove(node)


def _casts_to(node: onnx.NodeProto, kind: int) -> bool:
    return node.op_type == "Cast" and any(entry.name == "to" and entry.i == kind for entry in node.attribute)


def kept_names(network: Network, keep: Collection[str]) -> tuple[str, ...]:
    """The nodes of the fp32 network among ``keep``, layers by their own names."""
    names = {layer.node: layer.name for layer in network.layers}
    return tuple(names.get(node.name, node.name) for node in network.proto.graph.node if node.name in keep)
