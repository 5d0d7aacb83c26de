from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx as onnx_package
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from optpipe.backends import openvino as backend
from optpipe.backends._engine import engine_of
from optpipe.errors import RunError, UsageError
from optpipe.onnx_export import export
from optpipe.types import Engine, Target

needs_openvino = pytest.mark.skipif(
    importlib.util.find_spec("openvino") is None, reason="the package openvino is not installed"
)
needs_bf16 = pytest.mark.skipif(
    "bf16" not in backend.precisions("cpu"), reason="this processor has no instructions for bf16"
)

SHAPE = (3, 8, 8)
TARGET = Target("openvino", 4, SHAPE, threads=1)
IMAGES = np.random.default_rng(0).standard_normal((4, *SHAPE), dtype=np.float32)


@pytest.fixture(scope="module")
def network() -> nn.Module:
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU())
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(256, 5)).eval()


@pytest.fixture(scope="module")
def onnx(network: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("onnx") / "model.onnx"
    export(network, SHAPE, 4, path)
    return path


@pytest.fixture(scope="module")
def engine(onnx: Path) -> Engine:
    return engine_of(onnx, 0.0)


@pytest.fixture(scope="module")
def quantized(onnx: Path) -> Engine:
    """The network with quantize and dequantize nodes around its convolutions."""
    from onnxruntime import quantization

    class Calibration:
        def __init__(self) -> None:
            self._left = [{"input": IMAGES}]

        def get_next(self) -> dict[str, NDArray[np.float32]] | None:
            return self._left.pop() if self._left else None

    path = onnx.with_suffix(".int8.onnx")
    quantization.quantize_static(
        onnx,
        path,
        Calibration(),
        per_channel=True,
        op_types_to_quantize=["Conv"],
        activation_type=quantization.QuantType.QInt8,
        extra_options={"ActivationSymmetric": True},
    )
    return engine_of(path, 0.0)


def expected(network: nn.Module) -> NDArray[np.float32]:
    with torch.inference_mode():
        found: NDArray[np.float32] = network(torch.from_numpy(IMAGES)).numpy()
    return found


# ---------------------------------------------------------------- targets


def test_missing_package_is_named_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert backend.missing(TARGET) == "the package openvino is not installed: pip install 'optpipe[openvino]'"


@needs_openvino
def test_bf16_is_something_missing_on_a_processor_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "_native_bf16", lambda: False)
    assert backend.precisions("cpu") == ("fp32", "int8")
    assert backend.missing(TARGET) is None
    rest = replace(TARGET, precision="int8", options=(("int8_rest", "bf16"),))
    for target in (replace(TARGET, precision="bf16"), rest):
        assert "no instructions for bf16" in str(backend.missing(target))


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (replace(TARGET, precision="fp16"), r"target\.precision = 'fp16': .*fp32, bf16, int8"),
        (replace(TARGET, device="cuda"), r"target\.device = 'cuda'"),
        (replace(TARGET, batch=0), r"target\.batch = 0"),
        (replace(TARGET, threads=0), r"target\.threads = 0"),
        (replace(TARGET, options=(("streams", "2"),)), r"target\.options\.streams = '2'.*int8_rest"),
        (replace(TARGET, options=(("int8_rest", "fp16"),)), r"int8_rest = 'fp16': set one of f32, bf16"),
    ],
)
def test_a_target_it_cannot_serve_is_a_usage_error(target: Target, message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        backend.missing(target)
    with pytest.raises(UsageError, match=message):
        backend.build(tmp_path / "model.onnx", target, tmp_path)


# ---------------------------------------------------------------- precision


@needs_openvino
@needs_bf16
def test_an_fp32_engine_computes_in_f32_where_bf16_would_be_the_default(
    engine: Engine, network: nn.Module
) -> None:
    plain, half = backend.load(engine, TARGET), backend.load(engine, replace(TARGET, precision="bf16"))
    assert plain.notes == ("computed in f32",)
    assert half.notes == ("computed in bf16",)
    wanted = expected(network)
    assert np.abs(plain.run(IMAGES) - wanted).max() < 1e-5
    assert 1e-5 < np.abs(half.run(IMAGES) - wanted).max() < 0.03 * np.abs(wanted).max()


@needs_openvino
def test_an_int8_engine_says_how_much_of_it_is(quantized: Engine, network: nn.Module) -> None:
    session = backend.load(quantized, replace(TARGET, precision="int8"))
    assert session.notes == ("2 of 3 layers in int8, the rest in f32",)
    wanted = expected(network)
    assert 1e-5 < np.abs(session.run(IMAGES) - wanted).max() < 0.1 * np.abs(wanted).max()


@needs_openvino
@needs_bf16
def test_what_an_int8_engine_leaves_out_can_be_bf16(quantized: Engine) -> None:
    target = replace(TARGET, precision="int8", options=(("int8_rest", "bf16"),))
    assert backend.load(quantized, target).notes == ("2 of 3 layers in int8, the rest in bf16",)


@needs_openvino
def test_a_quantized_file_is_no_fp32_engine(quantized: Engine) -> None:
    with pytest.raises(RunError, match=r"layers in .*8 where target\.precision = 'fp32' wants f32"):
        backend.load(quantized, TARGET)


@needs_openvino
def test_a_file_without_quantization_is_no_int8_engine(engine: Engine) -> None:
    with pytest.raises(RunError, match="none of its 3 layers in int8"):
        backend.load(engine, replace(TARGET, precision="int8"))


def test_another_precision_than_the_one_asked_for_is_an_error() -> None:
    class Compiled:
        """What OpenVINO gives on a processor that does not serve the hint."""

        def get_property(self, name: str) -> SimpleNamespace:
            assert name == "INFERENCE_PRECISION_HINT"
            return SimpleNamespace(get_type_name=lambda: "f32")

    with pytest.raises(RunError, match=r"model\.onnx: OpenVINO computes in f32 .* bf16 was asked for"):
        backend._check_precision(Compiled(), Path("model.onnx"), replace(TARGET, precision="bf16"))


# ---------------------------------------------------------------- engines


@needs_openvino
def test_the_engine_is_the_onnx_file_where_it_lies(onnx: Path, tmp_path: Path) -> None:
    built = backend.build(onnx, TARGET, tmp_path / "folder")
    assert built == engine_of(onnx, 0.0)
    assert not (tmp_path / "folder").exists()


@needs_openvino
def test_an_engine_of_another_image_size_is_refused_with_both_shapes(engine: Engine) -> None:
    with pytest.raises(RunError, match=r"\?x3x8x8.*4x3x16x16"):
        backend.load(engine, replace(TARGET, input_shape=(3, 16, 16)))


@needs_openvino
def test_a_free_batch_dimension_of_any_name_is_set_to_the_targets(onnx: Path, tmp_path: Path) -> None:
    proto = onnx_package.load(onnx)
    for value in (*proto.graph.input, *proto.graph.output):
        value.type.tensor_type.shape.dim[0].dim_param = "N"
    renamed = tmp_path / "renamed.onnx"
    onnx_package.save(proto, renamed)
    session = backend.load(engine_of(renamed, 0.0), replace(TARGET, batch=5))
    assert session.run(np.zeros((7, *SHAPE), np.float32)).shape == (7, 5)


@needs_openvino
def test_failures_carry_openvinos_own_message_without_its_source_lines(tmp_path: Path) -> None:
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"no engine")
    with pytest.raises(
        RunError, match=r"broken\.onnx: Unable to read the model.*export the network anew"
    ) as e:
        backend.load(engine_of(broken, 0.0), TARGET)
    assert "core.cpp" not in str(e.value)


@needs_openvino
def test_more_threads_than_cores_still_run_and_say_so(engine: Engine) -> None:
    cores = len(os.sched_getaffinity(0))
    session = backend.load(engine, replace(TARGET, threads=cores + 1))
    assert session.sample().compute_ms > 0
    assert any(f"{cores + 1} were asked for" in note for note in session.notes)


# ---------------------------------------------------------------- what it does beside


@needs_openvino
def test_nothing_is_printed_written_or_sent(engine: Engine, tmp_path: Path) -> None:
    """Imported plainly, OpenVINO keeps a counter in the home folder and reports its import."""
    code = f"""
import sys
done = []
def watch(event, arguments):
    if event.startswith(("socket.", "subprocess.", "os.fork", "os.posix_spawn", "os.mkdir")):
        done.append((event, arguments))
sys.addaudithook(watch)
from pathlib import Path
from optpipe.backends import openvino as backend
from optpipe.types import Engine, Target
target = Target("openvino", 4, {SHAPE}, threads=1)
session = backend.load(Engine(Path({str(engine.path)!r}), {engine.sha256!r}, 0.0), target)
session.sample()
backend.fingerprint(target)
assert done == [], done
assert not [name for name in sys.modules if name.startswith("openvino_telemetry")]
assert "torch" not in sys.modules
"""
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "HOME": str(tmp_path)},
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []
