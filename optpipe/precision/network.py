"""An ONNX network as far as its precision is concerned: layers, residual additions, and running it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from optpipe.errors import RunError
from optpipe.types import Images

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Batch = NDArray[np.float32]

LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
"""Ops with a weight: what int8 quantizes."""

_LARGEST_BATCH = 32
_CRASHES_IN_FP16 = "MatmulTransposeFusion"
"""ONNX Runtime 1.31.1 dies of a segmentation fault where this rewrites an fp16 transformer on the CPU."""
_TENSORS_OF_A_BATCH = 256 * 2**20


@dataclass(frozen=True, slots=True)
class Layer:
    """An op with a weight; ``name`` is for people, ``node`` for the graph, the rest are tensors."""

    name: str
    node: str
    op: str
    input: str
    weight: str
    output: str


@dataclass(frozen=True, slots=True)
class Addition:
    """A sum of two activations; ``shortcut`` is the one with fewer ops behind it, ``branch`` the other."""

    node: str
    shortcut: str
    branch: str


@dataclass(frozen=True, slots=True)
class Network:
    """A graph with inferred shapes, its layers and residual additions in execution order. Not JSON-able."""

    proto: onnx.ModelProto
    layers: tuple[Layer, ...]
    additions: tuple[Addition, ...]
    input: str
    output: str
    opset: int

    @property
    def float_tensors(self) -> tuple[str, ...]:
        """The input and every activation in floating point, in execution order."""
        kinds = {value.name: value.type.tensor_type.elem_type for value in self.proto.graph.value_info}
        inner = [name for node in self.proto.graph.node for name in node.output]
        found = [name for name in inner if kinds.get(name) == onnx.TensorProto.FLOAT]
        return (self.input, *found, self.output)

    def weight(self, name: str) -> NDArray[np.float32]:
        """The values of an initializer."""
        return next(
            onnx.numpy_helper.to_array(tensor)
            for tensor in self.proto.graph.initializer
            if tensor.name == name
        )


def read(path: Path) -> Network:
    """The network in an fp32 ONNX file of one input and one output.

    Raises:
        RunError: the file cannot be read, or is no such network.
    """
    try:
        proto = onnx.load(path)
        proto = onnx.shape_inference.infer_shapes(proto)
    except (OSError, DecodeError, onnx.shape_inference.InferenceError) as error:
        text = str(error).strip().splitlines()
        raise RunError(f"cannot read {path} as ONNX: {text[0] if text else type(error).__name__}") from error
    graph = proto.graph
    weights = {tensor.name: tensor for tensor in graph.initializer}
    inputs = [value.name for value in graph.input if value.name not in weights]
    if len(inputs) != 1 or len(graph.output) != 1:
        raise RunError(
            f"{path}: has {len(inputs)} inputs and {len(graph.output)} outputs; must have one of each"
        )
    for index, node in enumerate(graph.node):
        node.name = node.name or f"{node.op_type}_{index}"
    opset = max(entry.version for entry in proto.opset_import if entry.domain in ("", "ai.onnx"))
    return Network(
        proto=proto,
        layers=tuple(
            _layer(node)
            for node in graph.node
            if node.op_type in LAYERS
            and _is_float(weights.get(node.input[1]))
            and node.input[0] not in weights
        ),
        additions=tuple(_additions(graph, set(weights))),
        input=inputs[0],
        output=graph.output[0].name,
        opset=opset,
    )


def _layer(node: onnx.NodeProto) -> Layer:
    weight = node.input[1]
    name = weight.removesuffix(".weight") if weight.endswith(".weight") else node.name
    return Layer(name, node.name, node.op_type, node.input[0], weight, node.output[0])


def _is_float(tensor: onnx.TensorProto | None) -> bool:
    return tensor is not None and tensor.data_type == onnx.TensorProto.FLOAT


def _additions(graph: onnx.GraphProto, weights: set[str]) -> Iterator[Addition]:
    depths: dict[str, int] = {}
    for node in graph.node:
        depth = 1 + max((depths.get(name, 0) for name in node.input), default=0)
        depths.update(dict.fromkeys(node.output, depth))
        if node.op_type == "Add" and not weights.intersection(node.input):
            # A stable sort: of two branches of one length, the first counts as the branch.
            branch, shortcut = sorted(node.input, key=lambda name: -depths.get(name, 0))
            yield Addition(node.name, shortcut, branch)


def session(proto: onnx.ModelProto) -> Any:
    """ONNX Runtime on the processor, with quantization computed as the graph says.

    Its own rewriting of quantized graphs is off: what is measured is the quantization, not what one engine
    makes of it.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    try:
        return onnxruntime.InferenceSession(
            proto.SerializeToString(),
            options,
            providers=["CPUExecutionProvider"],
            disabled_optimizers=[_CRASHES_IN_FP16],
        )
    except Exception as error:  # ONNX Runtime's exceptions have no common class of their own
        raise RunError(f"ONNX Runtime cannot run the network: {str(error).splitlines()[0]}") from error


def batches(images: Images, indices: Sequence[int], size: int) -> Iterator[Batch]:
    """The images at ``indices`` as arrays (N, C, H, W) of at most ``size`` images."""
    for start in range(0, len(indices), size):
        yield images.batch(indices[start : start + size]).numpy()


def logits(proto: onnx.ModelProto, images: Images, indices: Sequence[int]) -> NDArray[np.float64]:
    """What the network computes for the images: (N, classes)."""
    running = session(proto)
    name = running.get_inputs()[0].name
    found = [running.run(None, {name: batch})[0] for batch in batches(images, indices, _LARGEST_BATCH)]
    joined = np.concatenate(found).astype(np.float64)
    return joined.reshape(len(joined), -1)


def with_outputs(proto: onnx.ModelProto, names: Iterable[str]) -> onnx.ModelProto:
    """The network with these tensors, which must be float, as its outputs."""
    shown = onnx.ModelProto()
    shown.CopyFrom(proto)
    del shown.graph.output[:]
    for name in names:
        shown.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
    return shown


def batch_size(network: Network, names: Sequence[str]) -> int:
    """How many images at a time keep these tensors within 256 MiB."""
    values = (*network.proto.graph.value_info, *network.proto.graph.input, *network.proto.graph.output)
    sizes = {value.name: 4 * math.prod(_known(value)) for value in values}
    return max(1, min(_LARGEST_BATCH, _TENSORS_OF_A_BATCH // sum(sizes.get(name, 0) for name in names)))


def _known(value: onnx.ValueInfoProto) -> list[int]:
    """The sizes of a tensor's axes after the first, which is the batch; an unknown one counts as 1."""
    return [max(1, axis.dim_value) for axis in value.type.tensor_type.shape.dim[1:]]


def tensors(
    proto: onnx.ModelProto, names: Sequence[str], images: Images, indices: Sequence[int], size: int
) -> Iterator[dict[str, Batch]]:
    """The values of activations, ``size`` images at a time; names must not repeat."""
    inner = [name for name in names if name not in {value.name for value in proto.graph.input}]
    running = session(with_outputs(proto, inner))
    given = running.get_inputs()[0].name
    for batch in batches(images, indices, size):
        found = dict(zip(inner, running.run(None, {given: batch}), strict=True)) if inner else {}
        yield found | ({given: batch} if given in names else {})


def largest(
    network: Network, names: Sequence[str], images: Images, indices: Sequence[int]
) -> dict[str, float]:
    """The largest absolute value of each activation over the images.

    Raises:
        RunError: an activation is not finite.
    """
    reducing = onnx.ModelProto()
    reducing.CopyFrom(network.proto)
    graph = reducing.graph
    del graph.output[:]
    for name in names:
        for op in ("ReduceMax", "ReduceMin"):
            graph.node.append(onnx.helper.make_node(op, [name], [f"{op} {name}"], keepdims=0))
            graph.output.append(
                onnx.helper.make_tensor_value_info(f"{op} {name}", onnx.TensorProto.FLOAT, [])
            )
    running = session(reducing)
    found = np.zeros(2 * len(names))
    for batch in batches(images, indices, batch_size(network, names)):
        values = np.abs(np.array(running.run(None, {network.input: batch}), np.float64))
        found = np.maximum(found, values)
    peaks = dict(zip(names, np.maximum(found[::2], found[1::2]).tolist(), strict=True))
    for name, peak in peaks.items():
        if not np.isfinite(peak):
            raise RunError(f"the fp32 network's tensor {name} is not finite on the calibration images")
    return peaks


def sort_nodes(graph: onnx.GraphProto) -> None:
    """Put nodes after those whose outputs they read, as ONNX asks; what adds nodes appends them."""
    made = {name for node in graph.node for name in node.output}
    waiting, ordered = list(graph.node), []
    while waiting:
        later = []
        for node in waiting:
            if made.isdisjoint(node.input):
                made.difference_update(node.output)
                ordered.append(node)
            else:
                later.append(node)
        assert len(later) < len(waiting)
        waiting = later
    copies = [onnx.NodeProto() for _ in ordered]
    for copied, node in zip(copies, ordered, strict=True):
        copied.CopyFrom(node)
    del graph.node[:]
    graph.node.extend(copies)
