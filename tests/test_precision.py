from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from optpipe import precision
from optpipe.data import ImageSet, load_images
from optpipe.errors import MissingError, RunError, UsageError
from optpipe.models import input_channels, load_model
from optpipe.onnx_export import export, structure_digest
from optpipe.precision import Settings, convert, int8, network, placement, ranges
from optpipe.precision.placement import Placement
from optpipe.recipe import load
from optpipe.types import Event, Precision

RECIPES = Path(__file__).parents[1] / "recipes"
SHARED = Path(__file__).parents[2] / "shared"
SHAPE = (3, 12, 12)
FLOAT, HALF = TensorProto.FLOAT, TensorProto.FLOAT16


class Photographs:
    """Images held in memory."""

    labels = None
    digest = ""

    def __init__(self, count: int, scale: float = 1.0) -> None:
        self.images = scale * torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, indices: Sequence[int] | slice) -> torch.Tensor:
        return self.images[indices if isinstance(indices, slice) else list(indices)]


Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes stem, residual block and head; ``gain`` multiplies the stem."""

    def write(
        *, gain: float = 1.0, opset: int = 20, weights: dict[str, NDArray[np.float32]] | None = None
    ) -> Path:
        rng = np.random.default_rng(1)
        values: dict[str, NDArray[np.floating]] = {
            "stem.weight": gain * rng.standard_normal((8, 3, 3, 3), dtype=np.float32) / 5,
            "stem.bias": rng.standard_normal(8, dtype=np.float32) / 10,
            "block.weight": rng.standard_normal((8, 8, 3, 3), dtype=np.float32) / 8,
            "block.bias": rng.standard_normal(8, dtype=np.float32) / 10,
            "shrink": np.array(1 / gain, np.float32),
            "head.weight": rng.standard_normal((4, 8), dtype=np.float32),
            "head.bias": np.zeros(4, np.float32),
        }
        values.update(weights or {})
        nodes = [
            helper.make_node("Conv", ["input", "stem.weight", "stem.bias"], ["a"], "conv_1", pads=[1] * 4),
            helper.make_node("Relu", ["a"], ["b"], "relu_1"),
            helper.make_node("Mul", ["b", "shrink"], ["c"], "shrink_1"),
            helper.make_node("Conv", ["c", "block.weight", "block.bias"], ["d"], "conv_2", pads=[1] * 4),
            helper.make_node("Add", ["d", "c"], ["e"], "add_1"),
            helper.make_node("Relu", ["e"], ["f"], "relu_2"),
            helper.make_node("GlobalAveragePool", ["f"], ["g"], "pool"),
            helper.make_node("Flatten", ["g"], ["h"], "flat"),
            helper.make_node("Gemm", ["h", "head.weight", "head.bias"], ["logits"], "linear", transB=1),
        ]
        graph = helper.make_graph(
            nodes,
            "network",
            [helper.make_tensor_value_info("input", FLOAT, ["batch", *SHAPE])],
            [helper.make_tensor_value_info("logits", FLOAT, ["batch", 4])],
            [numpy_helper.from_array(value, name) for name, value in values.items()],
        )
        proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9)
        path = tmp_path / "model.onnx"
        onnx.save(proto, path)
        return path

    return write


def run(path: Path, images: NDArray[np.float32]) -> NDArray[np.float32]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    (name,) = (value.name for value in session.get_inputs())
    logits: NDArray[np.float32] = session.run(None, {name: images})[0]
    return logits


def initializers(path: Path) -> dict[str, NDArray[np.float32]]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer}


def producers(proto: onnx.ModelProto) -> dict[str, onnx.NodeProto]:
    return {name: node for node in proto.graph.node for name in node.output}


def check_file(path: Path) -> onnx.ModelProto:
    """A valid file of any batch with fp32 input and output."""
    proto = onnx.load(path)
    onnx.checker.check_model(proto, full_check=True)
    for value in (*proto.graph.input, *proto.graph.output):
        assert value.type.tensor_type.elem_type == FLOAT
        assert value.type.tensor_type.shape.dim[0].dim_param == "batch"
    assert all(len(run(path, np.zeros((count, *SHAPE), np.float32))) == count for count in (1, 5))
    return proto


# ---------------------------------------------------------------- fp32 and bf16


@pytest.mark.parametrize("wanted", ["fp32", "bf16"])
def test_fp32_and_bf16_are_the_file_itself(wanted: Precision, tmp_path: Path) -> None:
    source = tmp_path / "model.onnx"
    found = convert(source, tmp_path / "other.onnx", wanted, None)
    assert (found.path, found.kept_in_float, found.error) == (source, (), None)
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- fp16


def test_fp16_computes_in_fp16_between_fp32_inputs_and_outputs(write: Write, tmp_path: Path) -> None:
    images = Photographs(24)
    found = convert(write(), tmp_path / "half.onnx", "fp16", images)
    proto = check_file(found.path)
    assert [node.op_type for node in proto.graph.node].count("Cast") == 2
    assert {tensor.data_type for tensor in proto.graph.initializer} == {HALF}
    assert found.kept_in_float == ()
    assert found.error is not None and 0 < found.error < 1e-5
    exact = run(tmp_path / "model.onnx", images.images.numpy())
    np.testing.assert_allclose(run(found.path, images.images.numpy()), exact, rtol=0.01, atol=0.01)


def test_what_overflows_on_the_images_stays_in_fp32_without_casts_between(
    write: Write, tmp_path: Path
) -> None:
    source, images = write(gain=1e6), Photographs(24)
    found = convert(source, tmp_path / "half.onnx", "fp16", images)
    proto = check_file(found.path)
    assert found.kept_in_float == ("stem", "relu_1", "shrink_1")
    made = producers(proto)
    for node in proto.graph.node:
        if node.op_type == "Cast" and node.input[0] in made:
            assert made[node.input[0]].op_type != "Cast"
    exact = run(source, images.images.numpy())
    np.testing.assert_allclose(run(found.path, images.images.numpy()), exact, rtol=0.01, atol=0.01)
    assert found.error is not None and found.error < 1e-5
    # Without images nothing shows it but weights, which are in range here; they are not a hundred times on.
    blind = convert(source, tmp_path / "blind.onnx", "fp16", None)
    assert "relu_1" not in blind.kept_in_float


def test_the_margin_decides_what_counts_as_overflow(write: Write, tmp_path: Path) -> None:
    source, images = write(gain=5e3), Photographs(24)
    peak = network.largest(network.read(source), ("a",), images, range(24))["a"]
    assert 5000 < peak < 60000
    kept = {
        margin: convert(
            source, tmp_path / "half.onnx", "fp16", images, Settings(fp16_margin=margin)
        ).kept_in_float
        for margin in (1.0, 65504 / peak * 1.1)
    }
    assert list(kept.values()) == [(), ("stem", "relu_1")] or list(kept.values()) == [
        (),
        ("stem", "relu_1", "shrink_1"),
    ]


def test_a_weight_too_large_for_fp16_keeps_its_layer_in_fp32_without_images(
    write: Write, tmp_path: Path
) -> None:
    large = np.full((8, 3, 3, 3), 1e5, np.float32)
    source = write(weights={"stem.weight": large, "shrink": np.array(1e-6, np.float32)})
    found = convert(source, tmp_path / "half.onnx", "fp16", None)
    assert found.kept_in_float == ("stem",)
    assert initializers(found.path)["stem.weight"].dtype == np.float32
    check_file(found.path)


def test_weights_below_fp16_become_zero_and_other_constants_do_not(write: Write, tmp_path: Path) -> None:
    weight = np.full((4, 8), 1e-9, np.float32)
    weight[:, 0] = 1.0
    source = write(weights={"head.weight": weight, "shrink": np.array(1e-9, np.float32)})
    found = initializers(convert(source, tmp_path / "half.onnx", "fp16", None).path)
    assert found["head.weight"].tolist() == [[1.0] + [0.0] * 7] * 4
    assert found["shrink"] > 0


@pytest.mark.slow
def test_a_transformer_can_be_measured_in_every_precision(tmp_path: Path) -> None:
    from torchvision.models import VisionTransformer

    torch.manual_seed(0)
    model = VisionTransformer(12, 4, num_layers=2, num_heads=4, hidden_dim=64, mlp_dim=128, num_classes=10)
    torch.nn.init.normal_(model.heads.head.weight)
    export(model, SHAPE, 2, tmp_path / "model.onnx")
    wanted: tuple[tuple[Precision, precision.Rest, float], ...]
    wanted = (("fp16", "fp16", 1e-4), ("int8", "fp32", 0.01), ("int8", "fp16", 0.01))
    source, images = tmp_path / "model.onnx", Photographs(40)
    for number, rest, most in wanted:
        found = convert(source, tmp_path / "out.onnx", number, images, rest=rest)
        assert found.error is not None and 0 < found.error < most
        onnx.checker.check_model(onnx.load(found.path), full_check=True)


# ---------------------------------------------------------------- int8: the file


def test_int8_is_symmetric_by_channel_with_float_biases(write: Write, tmp_path: Path) -> None:
    found = convert(write(), tmp_path / "int8.onnx", "int8", Photographs(24))
    proto = check_file(found.path)
    values, made = initializers(found.path), producers(proto)
    assert [entry.version for entry in proto.opset_import] == [20]
    layers = [node for node in proto.graph.node if node.op_type in ("Conv", "Gemm")]
    assert [node.name for node in layers] == ["conv_1", "conv_2", "linear"]
    for node in layers:
        activation, weight, bias = (made.get(name) for name in node.input)
        assert activation is not None and weight is not None and bias is None
        assert values[node.input[2]].dtype == np.float32
        assert made[activation.input[0]].op_type == "QuantizeLinear"
        assert values[weight.input[0]].dtype == np.int8
        assert values[weight.input[1]].shape == values[weight.input[0]].shape[:1]
    for node in proto.graph.node:
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            continue
        assert values[node.input[2]].dtype == np.int8
        assert not values[node.input[2]].any()
    assert {str(value.dtype) for value in values.values()} == {"int8", "float32"}


def test_the_shortcut_of_an_addition_is_int8_and_its_branch_is_not(write: Write, tmp_path: Path) -> None:
    graph = network.read(write())
    (addition,) = graph.additions
    assert (addition.branch, addition.shortcut) == ("d", "c")
    peaks = dict.fromkeys(Placement().tensors(graph), 2.0)
    quantized = placement.place(graph, peaks, Placement())
    add = next(node for node in quantized.graph.node if node.op_type == "Add")
    assert add.input[0] == "d"
    assert producers(quantized)[add.input[1]].op_type == "DequantizeLinear"
    residual_in_float = placement.place(graph, peaks, Placement(residual=False))
    add = next(node for node in residual_in_float.graph.node if node.op_type == "Add")
    assert list(add.input) == ["d", "c"]
    assert placement.scales(quantized) == pytest.approx(dict.fromkeys(("input", "c", "h"), 2 / 127))


def test_a_layer_left_in_float_reads_and_holds_floats(write: Write) -> None:
    graph = network.read(write())
    chosen = Placement(frozenset({"conv_2"}))
    assert chosen.in_float(graph) == ("block",)
    proto = placement.place(graph, dict.fromkeys(chosen.tensors(graph), 1.0), chosen)
    onnx.checker.check_model(proto, full_check=True)
    conv = next(node for node in proto.graph.node if node.name == "conv_2")
    assert list(conv.input[1:]) == ["block.weight", "block.bias"]
    everything = Placement(frozenset(layer.node for layer in graph.layers), residual=False)
    assert everything.in_float(graph) == ("stem", "block", "head", "residual additions")
    assert placement.place(graph, {}, everything) == graph.proto


def test_same_arguments_give_the_same_bytes_silently_and_leave_one_file(
    write: Write, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, here = write(), tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    digests = set()
    for wanted in ("int8", "int8", "fp16"):
        convert(source, here / "out.onnx", wanted, Photographs(24), rest="fp16", seed=3)
        digests.add(hashlib.sha256((here / "out.onnx").read_bytes()).hexdigest())
    assert len(digests) == 2
    assert [entry.name for entry in here.iterdir()] == ["out.onnx"]
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["here", "model.onnx"]
    assert capfd.readouterr() == ("", "")


def test_rest_in_fp16_has_fp16_scales_that_do_not_underflow(write: Write, tmp_path: Path) -> None:
    weight = np.random.default_rng(0).standard_normal((8, 8, 3, 3), dtype=np.float32)
    weight[0] *= 1e-6
    weight[1] = 0
    source, images = write(weights={"block.weight": weight}), Photographs(24)
    found = convert(source, tmp_path / "int8.onnx", "int8", images, rest="fp16")
    proto = check_file(found.path)
    values = initializers(found.path)
    assert {value.dtype.type for value in values.values()} == {np.int8, np.float16}
    for node in proto.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            assert (values[node.input[1]] >= placement.SMALLEST_FP16_SCALE).all()
    assert [node.op_type for node in proto.graph.node].count("Cast") == 2
    in_fp32 = convert(source, tmp_path / "fp32.onnx", "int8", images)
    assert found.error == pytest.approx(in_fp32.error, rel=0.2)


def test_what_overflows_is_dequantized_in_fp32(write: Write, tmp_path: Path) -> None:
    head = np.random.default_rng(0).standard_normal((4, 8), dtype=np.float32) / 100
    values = {"shrink": np.array(1, np.float32), "head.weight": head}
    source, images = write(gain=1e5, weights=values), Photographs(24)
    assert network.largest(network.read(source), ("c",), images, range(24))["c"] > 65504
    found = convert(source, tmp_path / "int8.onnx", "int8", images, rest="fp16")
    check_file(found.path)
    assert np.isfinite(run(found.path, images.images.numpy())).all()
    assert found.error is not None and found.error < 0.01


def test_fp16_around_int8_needs_a_newer_opset(write: Write, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="needs ONNX opset 19, the file has 17"):
        convert(write(opset=17), tmp_path / "int8.onnx", "int8", Photographs(8), rest="fp16")
    check_file(convert(write(opset=17), tmp_path / "int8.onnx", "int8", Photographs(8)).path)


# ---------------------------------------------------------------- int8: what is chosen


def test_the_error_is_the_noise_of_the_logits_on_images_that_gave_no_range(
    write: Write, tmp_path: Path
) -> None:
    source, images = write(), Photographs(40)
    found = convert(source, tmp_path / "int8.onnx", "int8", images, seed=5)
    ranging, judging = int8.split(40, 256, seed=5)
    assert (len(ranging), len(judging)) == (30, 10)
    assert not set(ranging) & set(judging)
    shown = images.images[list(judging)].numpy()
    exact, noisy = (run(path, shown).astype(np.float64) for path in (source, found.path))
    exact, noisy = (logits - logits.mean(axis=1, keepdims=True) for logits in (exact, noisy))
    ratio = ((noisy - exact) ** 2).sum() / (exact**2).sum()
    assert found.error == pytest.approx(ratio, rel=0.3)  # ONNX Runtime rounds fused sums otherwise
    assert [trial.range_method for trial in found.trials[:3]] == ["minmax", "percentile", "entropy"]
    assert all(trial.images == 10 for trial in found.trials)


def test_the_range_method_with_the_least_error_is_taken(write: Write, tmp_path: Path) -> None:
    found = convert(write(), tmp_path / "int8.onnx", "int8", Photographs(40))
    least = min(found.trials, key=lambda trial: trial.error)
    assert found.range_method == least.range_method
    assert found.error == pytest.approx(least.error)
    assert [trial for trial in found.trials if trial.chosen] == [least]
    settings = Settings(range_methods=("entropy",))
    assert convert(write(), tmp_path / "e.onnx", "int8", Photographs(40), settings).range_method == "entropy"


def test_parts_go_to_float_only_while_the_error_is_too_large(write: Write, tmp_path: Path) -> None:
    source, images = write(), Photographs(40)
    everything = convert(source, tmp_path / "a.onnx", "int8", images, Settings(max_error=0.5))
    assert everything.kept_in_float == ()
    assert len(everything.trials) == 3
    strict = Settings(max_error=0.0, min_cut=0.0, max_layers_in_float=1)
    found = convert(source, tmp_path / "b.onnx", "int8", images, strict)
    assert everything.error is not None and found.error is not None
    assert found.error < everything.error / 2
    assert found.kept_in_float
    assert found.error == pytest.approx(min(trial.error for trial in found.trials))
    none = replace(strict, min_cut=0.99, max_layers_in_float=0)
    assert convert(source, tmp_path / "c.onnx", "int8", images, none).kept_in_float == ()


def test_what_cuts_the_error_most_goes_first(write: Write, tmp_path: Path) -> None:
    # One channel of the head's input drowns the others, whose part in the logits the scale then rounds off.
    stem = np.random.default_rng(1).standard_normal((8, 3, 3, 3), dtype=np.float32) / 5
    block = np.zeros((8, 8, 3, 3), np.float32)
    block[0, 0, 1, 1] = 3000.0
    head = np.random.default_rng(2).standard_normal((4, 8), dtype=np.float32)
    head[:, 0] = 0
    source = write(weights={"stem.weight": stem, "block.weight": block, "head.weight": head})
    settings = Settings(max_error=0.01, range_methods=("minmax",), max_layers_in_float=0)
    found = convert(source, tmp_path / "int8.onnx", "int8", Photographs(40), settings)
    assert found.trials[0].error > 0.1
    assert found.kept_in_float == ("head",)
    assert found.error is not None and found.error < 0.01


def test_a_single_layer_is_left_in_float_where_no_part_helps(write: Write, tmp_path: Path) -> None:
    # The block's weight has one huge entry in each channel: rounding leaves nothing of the others.
    block = np.random.default_rng(1).standard_normal((8, 8, 3, 3), dtype=np.float32) / 8
    block[:, 7, 0, 0] = 200.0
    stem = np.random.default_rng(1).standard_normal((8, 3, 3, 3), dtype=np.float32) / 5
    stem[7] = 0
    bias = np.zeros(8, np.float32)
    source = write(weights={"stem.weight": stem, "stem.bias": bias, "block.weight": block})
    settings = Settings(max_error=0.002, max_layers_in_float=1)
    found = convert(source, tmp_path / "int8.onnx", "int8", Photographs(40), settings)
    assert found.trials[0].error > 0.05
    assert "block" in found.kept_in_float
    assert found.error is not None and found.error < found.trials[0].error / 20


def test_structure_only_is_the_structure_of_the_final_file_without_measuring(
    write: Write, tmp_path: Path
) -> None:
    source, images, events = write(), Photographs(24), list[Event]()
    final = convert(source, tmp_path / "final.onnx", "int8", images, emit=events.append)
    assert events and {event.name for event in events} == {"int8"}
    quick = convert(source, tmp_path / "quick.onnx", "int8", images, structure_only=True)
    assert (quick.trials, quick.layers, quick.error, quick.range_method) == ((), (), None, "minmax")
    assert structure_digest(final.path) == structure_digest(quick.path)


def test_each_layer_has_its_own_and_its_accumulated_error(write: Write, tmp_path: Path) -> None:
    source, images = write(), Photographs(40)
    settings = Settings(range_methods=("minmax",))
    found = convert(source, tmp_path / "int8.onnx", "int8", images, settings)
    assert [(error.layer, error.op, error.quantized) for error in found.layers] == [
        ("stem", "Conv", True),
        ("block", "Conv", True),
        ("head", "Gemm", True),
    ]
    weight = initializers(source)["stem.weight"].astype(np.float64)
    step = np.abs(weight).max(axis=(1, 2, 3), keepdims=True) / 127
    noise = np.rint(weight / step) * step - weight
    by_hand = 10 * np.log10((weight**2).sum() / (noise**2).sum())
    stem = found.layers[0]
    assert stem.weight_sqnr_db == pytest.approx(by_hand, abs=0.05)
    assert stem.activation_sqnr_db is not None and 25 < stem.activation_sqnr_db < 50
    assert stem.weight_sqnr_db is not None and stem.accumulated_sqnr_db is not None
    power = 10 ** (-stem.weight_sqnr_db / 10) + 10 ** (-stem.activation_sqnr_db / 10)
    assert stem.accumulated_sqnr_db == pytest.approx(-10 * np.log10(power), abs=2)


def test_tables_show_what_was_tried_and_each_layer(write: Write, tmp_path: Path) -> None:
    found = convert(write(), tmp_path / "int8.onnx", "int8", Photographs(24))
    tried, layers = precision.tables(found)
    assert [row[0] for row in tried.rows] == [trial.range_method for trial in found.trials]
    assert sum(bool(row[-1]) for row in tried.rows) == 1
    assert [row[0] for row in layers.rows] == ["stem", "block", "head"]
    assert all(len(row) == len(table.columns) for table in (tried, layers) for row in table.rows)
    assert precision.tables(convert(tmp_path / "model.onnx", tmp_path / "x", "fp32", None)) == ()


# ---------------------------------------------------------------- ranges


def test_percentile_is_the_edge_of_the_bin_that_holds_it() -> None:
    counts = np.zeros(ranges.BINS, np.int64)
    counts[[0, 511, 2047]] = 90, 9, 1
    found = {
        percentile: ranges.thresholds("percentile", {"x": 8.0}, {"x": counts}, percentile)["x"]
        for percentile in (80.0, 95.0, 99.5, 100.0)
    }
    assert found == {80.0: 8 / 2048, 95.0: 2.0, 99.5: 8.0, 100.0: 8.0}


def test_entropy_clips_a_rare_outlier_and_keeps_a_uniform_range() -> None:
    values = np.abs(np.random.default_rng(0).standard_normal(200_000))
    peak = 40.0
    counts = np.bincount((np.append(values, peak * 0.999) / peak * ranges.BINS).astype(int), minlength=2048)
    clipped = ranges.thresholds("entropy", {"x": peak}, {"x": counts}, 100)["x"]
    assert 2 < clipped < 8
    uniform = np.full(ranges.BINS, 100, np.int64)
    assert ranges.thresholds("entropy", {"x": 1.0}, {"x": uniform}, 100)["x"] > 0.99


def test_histograms_count_every_value_whatever_the_batch(
    write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph, images = network.read(write()), Photographs(20)
    peaks = network.largest(graph, ("input", "c"), images, range(20))
    assert peaks["input"] == pytest.approx(float(images.images.abs().max()))
    whole = ranges.histograms(graph, peaks, images, range(20))
    assert int(whole["input"].sum()) == images.images.numel()
    monkeypatch.setattr(network, "_TENSORS_OF_A_BATCH", 10_000)
    assert network.batch_size(graph, ("input", "c")) == 1
    split = ranges.histograms(graph, peaks, images, range(20))
    # Another batch sums in another order: a value may fall to the other side of an edge.
    assert all(np.abs(whole[name] - split[name]).sum() < 20 for name in peaks)


# ---------------------------------------------------------------- mistakes


@pytest.mark.parametrize("images", [None, Photographs(0)])
def test_int8_without_images_is_refused(images: Photographs | None, write: Write, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="int8 needs calibration images"):
        convert(write(), tmp_path / "int8.onnx", "int8", images)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("range_methods", ()),
        ("percentile", 0.99),
        ("max_images", 0),
        ("max_error", float("nan")),
        ("min_cut", 1.0),
        ("max_layers_in_float", -1),
        ("fp16_margin", 0.5),
    ],
)
def test_settings_out_of_range_are_refused(key: str, value: object, tmp_path: Path) -> None:
    settings = replace(Settings(), **{key: value})  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=rf"\[precision\] {key} = "):
        convert(tmp_path / "model.onnx", tmp_path / "out.onnx", "fp16", None, settings)


@pytest.mark.parametrize("wanted", ["fp16", "int8"])
def test_without_onnxruntime_the_package_to_install_is_named(
    wanted: Precision, write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, images = write(), Photographs(4)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingError, match=rf"^{wanted} files are made with onnxruntime.*optpipe\[cpu\]"):
        convert(source, tmp_path / "made.onnx", wanted, images)


def test_a_file_that_is_not_onnx_is_refused(tmp_path: Path) -> None:
    (tmp_path / "broken.onnx").write_bytes(b"not a network")
    for name in ("broken.onnx", "absent.onnx"):
        with pytest.raises(RunError, match=rf"cannot read .*{name} as ONNX"):
            convert(tmp_path / name, tmp_path / "out.onnx", "fp16", None)


def test_values_that_are_not_finite_are_named(write: Write, tmp_path: Path) -> None:
    source = write(weights={"stem.bias": np.full(8, np.inf, np.float32)})
    with pytest.raises(RunError, match="tensor c is not finite"):
        convert(source, tmp_path / "out.onnx", "int8", Photographs(8))
    assert not (tmp_path / "out.onnx").exists()


def test_a_network_without_layers_has_nothing_to_quantize(tmp_path: Path) -> None:
    class Mean(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return images.mean((2, 3))

    export(Mean(), SHAPE, 2, tmp_path / "model.onnx")
    with pytest.raises(RunError, match="no convolution or linear layer"):
        convert(tmp_path / "model.onnx", tmp_path / "out.onnx", "int8", Photographs(8))


# ---------------------------------------------------------------- trained networks


def openvino_logits(path: Path, images: NDArray[np.float32]) -> NDArray[np.float32]:
    openvino = pytest.importorskip("openvino", reason="OpenVINO is not installed")
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    compiled = openvino.Core().compile_model(path, "CPU", settings)
    logits: NDArray[np.float32] = compiled(images)[0]
    return logits


def trained(recipe: Path, folder: Path) -> tuple[Path, ImageSet, ImageSet]:
    """The exported network of a recipe, its calibration and its evaluation images."""
    loaded = load(recipe)
    model = load_model(loaded.model, loaded.folder)
    channels, prepared = input_channels(model), loaded.data.preprocess
    calibration, evaluation = (
        load_images(spec, prepared, channels, loaded.folder)
        for spec in (loaded.data.calibration, loaded.data.evaluation)
    )
    export(model, calibration.shape, 16, folder / "model.onnx")
    return folder / "model.onnx", calibration, evaluation


@pytest.mark.parametrize(
    "recipe",
    [
        pytest.param("practise.toml", marks=pytest.mark.slow),
        pytest.param("cifar10/practise_resnet56.toml", marks=[pytest.mark.slow, pytest.mark.shared]),
    ],
)
def test_int8_and_fp16_lose_at_most_half_a_point_on_every_engine(recipe: str, tmp_path: Path) -> None:
    if recipe.startswith("cifar10") and not SHARED.is_dir():
        pytest.skip(f"{SHARED} is not there")
    source, calibration, evaluation = trained(RECIPES / recipe, tmp_path)
    assert evaluation.labels is not None
    images, labels = evaluation.batch(slice(None)).numpy(), evaluation.labels.numpy()
    right = (run(source, images).argmax(axis=1) == labels).mean()
    assert right > 0.9
    half = convert(source, tmp_path / "half.onnx", "fp16", calibration)
    quantized = convert(source, tmp_path / "int8.onnx", "int8", calibration, seed=0)
    one = Settings(range_methods=("minmax",), max_images=100)
    with_half = convert(source, tmp_path / "int8h.onnx", "int8", calibration, one, rest="fp16")
    assert half.kept_in_float == ()
    for path in (half.path, quantized.path, with_half.path):
        assert (run(path, images).argmax(axis=1) == labels).mean() >= right - 0.005
    assert (openvino_logits(quantized.path, images).argmax(axis=1) == labels).mean() >= right - 0.005
