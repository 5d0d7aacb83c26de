"""torch to ONNX: the file, the proof that it computes the same, and a digest of its structure."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import io
import logging
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import torch
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from torch import nn

from optpipe import leftovers
from optpipe.errors import RunError, lacks_memory
from optpipe.files import write_atomically
from optpipe.types import Images, Session

OPSET = 20
"""The newest opset that ONNX Runtime 1.17, TensorRT 10 and OpenVINO 2024 all read."""

_PARITY_BATCH = 64
_SHAPE_TYPES = (onnx.TensorProto.INT64, onnx.TensorProto.BOOL)


@dataclass(frozen=True, slots=True)
class Parity:
    """How far an engine's logits are from torch's.

    ``max_abs`` is the largest difference of a logit, ``max_rel`` the largest as a fraction of its image's
    largest logit, ``top1_agreement`` the fraction of images of the same class, ``worst_index`` the image
    that comes closest to the tolerance or exceeds it most.
    """

    max_abs: float
    max_rel: float
    top1_agreement: float
    count: int
    worst_index: int
    atol: float
    rtol: float
    passed: bool


def export(
    model: nn.Module,
    input_shape: Sequence[int],
    batch: int,
    path: Path,
    *,
    input_name: str = "input",
    output_names: Sequence[str] = ("logits",),
) -> None:
    """Write ``model`` in eval mode as one ONNX file of any batch; ``input_shape`` is (C, H, W) of an image.

    Batch-norm is folded into the convolutions. The same weights give the same bytes; stack traces, local
    paths and the exporter's notes are left out. ``model`` is unchanged and the file appears whole or not at
    all. Raises RunError where torch cannot export the network or the file cannot be written.
    """
    network = copy.deepcopy(model).eval().cpu()
    # A batch of 1 would be taken for a constant.
    images = torch.zeros(max(batch, 2), *input_shape)
    try:
        with _quiet():
            program = torch.onnx.export(
                network,
                (images,),
                dynamo=True,
                opset_version=OPSET,
                input_names=[input_name],
                output_names=list(output_names),
                dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
                external_data=False,
                optimize=True,
                verbose=False,
            )
    except (torch.onnx.OnnxExporterError, RuntimeError) as error:
        if lacks_memory(error):
            raise
        raise RunError(
            f"torch cannot export {type(model).__name__} to ONNX: {_first_line(error)}; "
            "its forward must be free of branches on data and work for any batch"
        ) from error
    assert program is not None
    proto = program.model_proto
    _strip(proto)
    leftovers.forget(program.exported_program)
    write_atomically(path, proto.SerializeToString(deterministic=True))


def narrow(source: Path, model: nn.Module, path: Path) -> bool:
    """Write ``source``, an export of a network, with its layers as wide as they are in ``model``.

    It has the structure that exporting ``model`` gives, for a small part of the time, and takes as long to
    run; its weights are the first of the source's, so that it computes nothing of use. False, and no file,
    where the graph holds weights that are no convolution's or linear layer's of the same name: only an
    export will do then. ``structure_digest`` tells whether both agree.
    """
    proto = onnx.load(source)
    weights = {tensor.name: tensor for tensor in proto.graph.initializer}
    makers = {name: node for node in proto.graph.node for name in node.output}
    wanted: dict[str, tuple[int, ...]] = {}
    for node in proto.graph.node:
        held = [name for name in node.input if name in weights and _is_weight(weights[name])]
        if not held:
            continue
        shapes = _widths_of(node, [tuple(weights[name].dims) for name in held], model, held[0])
        if shapes is None or any(
            wanted.setdefault(name, own) != own for name, own in zip(held, shapes, strict=True)
        ):
            return False
        if node.op_type == "Gemm" and node.input[0] in makers:
            _flatten_to(makers[node.input[0]], weights, model.get_submodule(held[0].removesuffix(".weight")))
    for name, own in wanted.items():
        kept = onnx.numpy_helper.to_array(weights[name])[tuple(slice(size) for size in own)]
        if kept.shape != own:
            return False
        weights[name].CopyFrom(onnx.numpy_helper.from_array(np.ascontiguousarray(kept), name))
    write_atomically(path, proto.SerializeToString(deterministic=True))
    return True


def _flatten_to(node: onnx.NodeProto, weights: dict[str, onnx.TensorProto], layer: nn.Module) -> None:
    """Let the reshaping before a linear layer give as many features as the layer takes."""
    if node.op_type == "Reshape" and node.input[1] in weights and isinstance(layer, nn.Linear):
        shape = onnx.numpy_helper.to_array(weights[node.input[1]]).copy()
        if len(shape) == 2 and shape[1] > layer.in_features:
            shape[1] = layer.in_features
            weights[node.input[1]].CopyFrom(onnx.numpy_helper.from_array(shape, node.input[1]))


def _is_weight(tensor: onnx.TensorProto) -> bool:
    return tensor.data_type not in _SHAPE_TYPES and len(tensor.dims) > 0


def _widths_of(
    node: onnx.NodeProto, held: Sequence[tuple[int, ...]], model: nn.Module, name: str
) -> list[tuple[int, ...]] | None:
    """The shapes of a node's weight and bias in ``model``; None where the node is no layer of it.

    A grouped convolution's node is given its number of groups too.
    """
    layer = dict(model.named_modules()).get(name.removesuffix(".weight"))
    if node.op_type not in {"Conv", "Gemm"} or not isinstance(layer, nn.Conv2d | nn.Linear):
        return None
    own = tuple(layer.weight.shape)
    if node.op_type == "Gemm" and not any(one.name == "transB" and one.i for one in node.attribute):
        own = own[::-1]
    if len(own) != len(held[0]):
        return None
    for attribute in node.attribute:
        if attribute.name == "group" and isinstance(layer, nn.Conv2d):
            attribute.i = layer.groups
    return [own, *[(layer.weight.shape[0],) for _ in held[1:]]]


def parity(
    model: nn.Module, session: Session, images: Images, *, atol: float, rtol: float, count: int
) -> Parity:
    """Compare an engine with torch on the first ``count`` images.

    An image passes when none of its logits differs by more than ``atol + rtol * largest logit``; a logit
    that is not finite on either side never passes.
    """
    network = copy.deepcopy(model).eval().cpu()
    count = min(count, len(images))
    if count < 1:
        raise RunError("no images to compare the engine with torch on: give at least one")
    differences, scales, agreements = [], [], []
    for start in range(0, count, _PARITY_BATCH):
        batch = images.batch(slice(start, min(start + _PARITY_BATCH, count)))
        with torch.inference_mode():
            expected = network(batch.cpu()).double().numpy()
        got = session.run(batch.cpu().numpy()).astype(np.float64)
        if got.shape != expected.shape:
            raise RunError(f"the engine returns logits of shape {got.shape}, torch {expected.shape}")
        with np.errstate(invalid="ignore"):
            differences.append(np.nan_to_num(np.abs(got - expected).max(axis=1), nan=np.inf))
        scales.append(np.abs(expected).max(axis=1))
        agreements.append(got.argmax(axis=1) == expected.argmax(axis=1))
    difference, scale = np.concatenate(differences), np.concatenate(scales)
    finite = np.isfinite(difference) & np.isfinite(scale)
    difference = np.where(finite, difference, np.inf)
    scale = np.where(finite, np.maximum(scale, np.finfo(np.float64).tiny), 1.0)
    allowed = atol + rtol * scale
    return Parity(
        max_abs=float(difference.max()),
        max_rel=float((difference / scale).max()),
        top1_agreement=float(np.concatenate(agreements).mean()),
        count=count,
        worst_index=int((difference - allowed).argmax()),
        atol=atol,
        rtol=rtol,
        passed=bool((difference <= allowed).all()),
    )


def check_parity(found: Parity) -> None:
    """Raise RunError unless the engine computes what torch does within the tolerance."""
    if not found.passed:
        raise RunError(
            f"the engine differs from torch by up to {found.max_abs:.3g} (relative {found.max_rel:.3g}) on "
            f"{found.count} images, most on image {found.worst_index}; allowed is {found.atol:g} + "
            f"{found.rtol:g} of an image's largest logit; top-1 agrees on {found.top1_agreement:.1%}"
        )


def structure_digest(path: Path) -> str:
    """sha256 of an ONNX graph without its weights and names: equal for networks that take equally long.

    Initializers count by shape and type; whole numbers and truth values, which are shapes and axes, by
    value. Names are replaced by their order of appearance.
    """
    try:
        proto = onnx.load(path)
    except (OSError, DecodeError) as error:
        raise RunError(f"cannot read {path} as ONNX: {_first_line(error)}") from error
    digest = hashlib.sha256()
    for opset in sorted(f"{entry.domain}:{entry.version}" for entry in proto.opset_import):
        digest.update(f"opset {opset}\n".encode())
    for function in proto.functions:
        digest.update(function.SerializeToString(deterministic=True))
    for line in _graph_lines(proto.graph, {"": "-"}):
        digest.update(f"{line}\n".encode())
    return digest.hexdigest()


def _graph_lines(graph: onnx.GraphProto, outer: dict[str, str]) -> Iterator[str]:
    """A graph as text, a line for each value and node; ``outer`` maps names from outside to stand-ins."""
    names = dict(outer)

    def stand_in(name: str) -> str:
        return names.setdefault(name, f"v{len(names)}")

    weights = {tensor.name: _tensor_text(tensor) for tensor in graph.initializer}
    for value in graph.input:
        yield f"input {stand_in(value.name)} {_type_text(value)}"
    for node in graph.node:
        for name in node.input:
            if name in weights:
                yield f"weight {stand_in(name)} {weights.pop(name)}"
        inputs = ",".join(stand_in(name) for name in node.input)
        outputs = ",".join(stand_in(name) for name in node.output)
        yield f"node {node.domain}:{node.op_type} ({inputs}) -> ({outputs})"
        for attribute in sorted(node.attribute, key=lambda entry: entry.name):
            yield from _attribute_lines(attribute, names)
    for value in graph.output:
        yield f"output {stand_in(value.name)} {_type_text(value)}"


def _attribute_lines(attribute: onnx.AttributeProto, names: dict[str, str]) -> Iterator[str]:
    yield f"attribute {attribute.name} {attribute.type}"
    if attribute.type == onnx.AttributeProto.GRAPH:
        yield from _graph_lines(attribute.g, names)
    elif attribute.type == onnx.AttributeProto.TENSOR:
        yield _tensor_text(attribute.t)
    else:
        yield str(onnx.helper.get_attribute_value(attribute))


def _tensor_text(tensor: onnx.TensorProto) -> str:
    text = f"{tensor.data_type} {list(tensor.dims)}"
    if tensor.data_type in _SHAPE_TYPES:
        text += f" {onnx.numpy_helper.to_array(tensor).ravel().tolist()}"
    return text


def _type_text(value: onnx.ValueInfoProto) -> str:
    tensor = value.type.tensor_type
    return f"{tensor.elem_type} {[d.dim_value if d.HasField('dim_value') else '?' for d in tensor.shape.dim]}"


def _strip(proto: onnx.ModelProto) -> None:
    """Take out what the exporter notes for its own debugging, local paths among it."""
    graph = proto.graph
    del proto.metadata_props[:]
    del graph.metadata_props[:]
    del graph.value_info[:]
    parts: Iterable[onnx.NodeProto | onnx.ValueInfoProto | onnx.TensorProto]
    for parts in (graph.node, graph.input, graph.output, graph.initializer):
        for part in parts:
            del part.metadata_props[:]
            part.doc_string = ""
    for function in proto.functions:
        del function.metadata_props[:]
        for node in function.node:
            del node.metadata_props[:]
            node.doc_string = ""


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hold back what the exporter prints, logs and warns of; its failures are exceptions."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    sink = io.StringIO()
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        with warnings.catch_warnings(), contextlib.redirect_stdout(sink), contextlib.redirect_stderr(sink):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _first_line(error: BaseException) -> str:
    """The first line of the cause, which says more than torch's and ONNX's own introductions."""
    text = str(error.__cause__ or error).strip()
    return text.splitlines()[0] if text else type(error).__name__
