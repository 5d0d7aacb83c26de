"""ONNX files that are wrong, and ones that reach for other files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from onnx import TensorProto, helper

from faults.cases import Case
from faults.workspace import Change, cut, nothing, write_onnx, wrote

BENCH = ("bench", "model.onnx", "--duration", "0.1", "--warmUp", "1", "--threads", "1")


def _onnx(name: str, make: Change, says: str, code: int = 2) -> Case:
    return Case(name, make, BENCH, code, says)


def _changed(change: Callable[[Any], object]) -> Change:
    return lambda folder: write_onnx(folder / "model.onnx", change)


def _shape(*dims: int | str) -> Change:
    def change(model: Any) -> None:
        info = helper.make_tensor_value_info("images", TensorProto.FLOAT, list(dims))
        model.graph.input[0].CopyFrom(info)

    return _changed(change)


def _type(kind: int) -> Change:
    return _changed(lambda model: setattr(model.graph.input[0].type.tensor_type, "elem_type", kind))


def _external(location: str, length: int = 432) -> Change:
    def change(model: Any) -> None:
        weight = model.graph.initializer[0]
        weight.ClearField("raw_data")
        weight.data_location = TensorProto.EXTERNAL
        for key, value in (("location", location), ("offset", "0"), ("length", str(length))):
            entry = weight.external_data.add()
            entry.key, entry.value = key, value

    return _changed(change)


def _folder(folder: Path) -> None:
    (folder / "model.onnx").unlink()
    (folder / "model.onnx").mkdir()


def _secret(folder: Path) -> None:
    (folder.parent / "secret").write_bytes(bytes(432))
    _external("../secret")(folder)


def _linked(folder: Path) -> None:
    (folder / "weights.data").symlink_to("/dev/zero")
    _external("weights.data")(folder)


def _circle(model: Any) -> None:
    model.graph.node[0].input[0] = "pooled"


def _no_output(model: Any) -> None:
    del model.graph.output[:]


def _no_input(model: Any) -> None:
    del model.graph.input[:]


def _no_nodes(model: Any) -> None:
    del model.graph.node[:]


def _two_inputs(model: Any) -> None:
    model.graph.input.append(helper.make_tensor_value_info("more", TensorProto.FLOAT, [1]))


def _unreadable(folder: Path) -> None:
    (folder / "model.onnx").unlink()
    (folder / "model.onnx").symlink_to("model.onnx")


def _weight(**fields: object) -> Change:
    def change(model: Any) -> None:
        weight = model.graph.initializer[0]
        for key, value in fields.items():
            if key == "dims":
                del weight.dims[:]
                weight.dims.extend(value)
            else:
                setattr(weight, key, value)

    return _changed(change)


CASES = (
    Case("a model that is not there", nothing, ("bench", "nowhere.onnx"), 2, "there is no such file or run"),
    Case("a model and none to compare with", nothing, (*BENCH, "--vs", "nowhere.onnx"), 2, "no such file"),
    Case("an unknown engine", nothing, (*BENCH, "--backend", "onnx"), 2, "did you mean onnxruntime?"),
    Case("no engine in particular", nothing, (*BENCH, "--backend", "fastest"), 2, "name a backend"),
    Case(
        "an engine that takes no ONNX", nothing, (*BENCH, "--backend", "inductor"), 2, "not from ONNX files"
    ),
    Case("a batch of none", nothing, (*BENCH, "--batch", "0"), 2, "--batch"),
    Case("a batch without end", nothing, (*BENCH, "--batch", "9" * 30), 2, "--batch"),
    Case("threads without end", nothing, (*BENCH[:-1], "9" * 30), 2, "--threads"),
    Case("a duration that is none", nothing, (*BENCH, "--duration", "nan"), 2, "--duration"),
    _onnx("a folder for a model", _folder, "holds no deploy bundle"),
    _onnx("a link to itself for a model", _unreadable, "model.onnx"),
    _onnx("an empty model", wrote("model.onnx", b""), "is no ONNX model"),
    _onnx("a text for a model", wrote("model.onnx", b"a network of one layer"), "is no ONNX model"),
    _onnx("one byte for a model", wrote("model.onnx", b"\x08"), "is no ONNX model"),
    _onnx(
        "weights for a model",
        lambda folder: (folder / "weights.pth").replace(folder / "model.onnx"),
        "is no ONNX model",
    ),
    _onnx("half a model", cut("model.onnx", 0.5), "model.onnx"),
    _onnx("all but the end of a model", cut("model.onnx", 0.99), "model.onnx"),
    _onnx("a model without an input", _changed(_no_input), "has no input"),
    _onnx("a model without an output", _changed(_no_output), "no output"),
    _onnx("a model without layers", _changed(_no_nodes), "", 4),
    _onnx("a model of two inputs", _changed(_two_inputs), "", 4),
    _onnx("a model that feeds itself", _changed(_circle), "", 4),
    _onnx(
        "an operator that is none", _changed(lambda m: setattr(m.graph.node[0], "op_type", "Conw")), "Conw", 4
    ),
    _onnx(
        "an operator of somebody's own",
        _changed(lambda m: setattr(m.graph.node[0], "domain", "evil.ops")),
        "evil.ops",
        4,
    ),
    _onnx("an opset of the future", _changed(lambda m: setattr(m.opset_import[0], "version", 9999)), "", 4),
    _onnx("a format of the future", _changed(lambda m: setattr(m, "ir_version", 9999)), "", 4),
    _onnx("images of no fixed height", _shape("batch", 3, "height", 16), "of a fixed size"),
    _onnx("images of two dimensions", _shape("batch", 3), "of a fixed size"),
    _onnx("images of no dimension", _shape(), "of a fixed size"),
    _onnx("images of less than nothing", _shape("batch", 3, -16, 16), "of a fixed size"),
    _onnx("images of 10^18 pixels", _shape("batch", 3, 10**9, 10**9), "model.onnx"),
    _onnx("a batch of 2^40 in a model", _shape(2**40, 3, 16, 16), "model.onnx"),
    _onnx("other channels than the layers take", _shape("batch", 5, 16, 16), "", 4),
    _onnx("images in half precision", _type(TensorProto.FLOAT16), "", 4),
    _onnx("images of words", _type(TensorProto.STRING), "", 4),
    _onnx("images of an unknown type", _type(99), "", 4),
    _onnx("a weight of a shape of its own", _weight(dims=[2**40, 2**20]), "", 4),
    _onnx("a weight of less than nothing", _weight(dims=[-4, 3, 3, 3]), "", 4),
    _onnx("a weight of an unknown type", _weight(data_type=99), "", 4),
    _onnx("a kernel without values", _weight(raw_data=b""), "", 4),
    _onnx("a weight in a folder above", _secret, "outside"),
    _onnx("a weight in the system's files", _external("/etc/passwd"), "outside"),
    _onnx("a weight behind a link to endless zeros", _linked, "outside"),
    _onnx("a weight in a file that is not there", _external("nowhere.data"), "nowhere.data", 4),
)
