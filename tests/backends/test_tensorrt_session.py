"""A TensorRT engine on a GPU that is not there: results are ONNX Runtime's, failures are TensorRT's."""

from __future__ import annotations

import gc
import json
import re
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx as onnx_package
import onnxruntime
import pytest
from conftest import WriteOnnx
from fake_tensorrt import RELEASES
from fake_tensorrt_cuda import COPY_MS
from fake_tensorrt_runtime import COMPUTE_MS, Machine
from numpy.typing import NDArray

from optpipe.backends import tensorrt as backend
from optpipe.backends._tensorrt_session import TensorrtSession
from optpipe.errors import RunError
from optpipe.types import Engine, Target

SHAPE = (3, 16, 16)
BATCH = 4


def target_of(*options: tuple[str, str], batch: int = BATCH) -> Target:
    return Target("tensorrt", batch, SHAPE, "fp32", "cuda", options=options)


@pytest.fixture(params=RELEASES)
def machine(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[Machine]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    found = Machine(request.param)
    found.install(monkeypatch)
    yield found
    assert found.cuda.live() == {}, "something was not released"


@pytest.fixture
def onnx(write_onnx: WriteOnnx) -> Path:
    return write_onnx("model.onnx")


@pytest.fixture
def engine(machine: Machine, onnx: Path, tmp_path: Path) -> Engine:
    return backend.build(onnx, target_of(), tmp_path / "engine")


def expected(onnx: Path, images: NDArray[np.float32]) -> NDArray[np.float32]:
    session = onnxruntime.InferenceSession(onnx, providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {"images": images})
    found: NDArray[np.float32] = logits
    return found


@pytest.mark.parametrize("graph", ["on", "off"])
def test_any_number_of_images_gives_onnx_runtimes_logits(
    machine: Machine, engine: Engine, onnx: Path, graph: str
) -> None:
    session = backend.load(engine, target_of(("cuda_graph", graph)))
    for count in (1, BATCH, BATCH + 1, 3 * BATCH):
        images = np.random.default_rng(count).standard_normal((count, *SHAPE), dtype=np.float32)
        got = session.run(images)
        assert got.dtype == np.float32
        np.testing.assert_allclose(got, expected(onnx, images), atol=1e-6)
    session.close()


def test_an_engine_for_a_range_of_batches_runs_at_the_targets(
    machine: Machine, onnx: Path, tmp_path: Path
) -> None:
    target = target_of(("profile", "1,4,8"), batch=2)
    session = backend.load(backend.build(onnx, target, tmp_path), target)
    images = np.random.default_rng(0).standard_normal((5, *SHAPE), dtype=np.float32)
    np.testing.assert_allclose(session.run(images), expected(onnx, images), atol=1e-6)
    session.close()


def test_results_of_one_run_survive_the_next(machine: Machine, engine: Engine) -> None:
    session = backend.load(engine, target_of())
    first = session.run(np.ones((2, *SHAPE), np.float32))
    kept = first.copy()
    session.run(np.zeros((2, *SHAPE), np.float32))
    session.sample()
    np.testing.assert_array_equal(first, kept)
    session.close()


@pytest.mark.parametrize("graph", ["on", "off"])
def test_a_sample_is_the_gpus_time_between_the_copies(machine: Machine, engine: Engine, graph: str) -> None:
    session = backend.load(engine, target_of(("cuda_graph", graph)))
    sample = session.sample()
    assert (sample.h2d_ms, sample.compute_ms, sample.d2h_ms) == (COPY_MS, COMPUTE_MS, COPY_MS)
    assert sample.enqueue_ms is not None
    assert 0 < sample.enqueue_ms < 1000
    assert session.headline == "GPU Compute Time"
    assert session.state() is None
    session.close()


def test_the_engine_is_replayed_as_a_graph(machine: Machine, engine: Engine) -> None:
    session = backend.load(engine, target_of())
    machine.cuda.calls.clear()
    session.sample()
    assert session.notes == ("CUDA graph",)
    assert machine.cuda.calls.count("cudaGraphLaunch") == 1
    session.close()


def test_the_graph_can_be_switched_off(machine: Machine, engine: Engine) -> None:
    session = backend.load(engine, target_of(("cuda_graph", "off")))
    assert session.notes == ("enqueued layer by layer, without a CUDA graph: cuda_graph is off",)
    assert "cudaStreamBeginCapture" not in machine.cuda.calls
    session.close()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            "",
            "the work could not be enqueued while recording .*operation not permitted when stream is captur",
        ),
        ("cudaStreamEndCapture", "cudaErrorStreamCaptureInvalidated"),
        ("cudaGraphInstantiate", "cudaGraphInstantiate failed with cudaErrorStreamCaptureInvalidated"),
    ],
)
def test_where_no_graph_can_be_recorded_the_engine_still_runs_and_says_so(
    machine: Machine, engine: Engine, onnx: Path, call: str, message: str
) -> None:
    if call:
        machine.cuda.failing[call] = "cudaErrorStreamCaptureInvalidated"
    else:
        machine.faults.add("capture")
    session = backend.load(engine, target_of())
    (note,) = session.notes
    assert note.startswith("enqueued layer by layer, without a CUDA graph: ")
    assert re.search(message, note)
    images = np.random.default_rng(0).standard_normal((BATCH, *SHAPE), dtype=np.float32)
    np.testing.assert_allclose(session.run(images), expected(onnx, images), atol=1e-6)
    assert session.sample().compute_ms == COMPUTE_MS
    session.close()


def test_an_engine_whose_digest_is_not_the_recorded_one_is_never_deserialized(
    machine: Machine, engine: Engine
) -> None:
    engine.path.write_bytes(engine.path.read_bytes() + b" ")
    with pytest.raises(RunError, match="it is not the engine that was built and is not loaded"):
        backend.load(engine, target_of())
    with pytest.raises(RunError, match=r"absent\.plan: .*build it first"):
        backend.load(replace(engine, path=engine.path.with_name("absent.plan")), target_of())
    assert machine.deserialized == 0


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("runtime", r"cannot open .*engine\.plan: CUDA initialization failure with error: 35"),
        (
            "deserialize",
            r"cannot open .*Version tag does not match.*another TensorRT release .*build it again",
        ),
        ("context", r"cannot open .*OutOfMemory.*memory may be full"),
        ("input_shape", r"takes inputs of shape -1x3x16x16, the target has 4x3x16x16 \(setInputShape"),
        ("infer_raises", r"cannot run .*Shape inference failed"),
        ("infer_names", r"returns logits of shape 4x8 for 4x3x16x16 images"),
        ("address", r"cannot bind images of .*setTensorAddress"),
        ("execute", r"cannot run .*illegal memory access.*build it again"),
    ],
)
def test_what_tensorrt_refuses_is_told_and_leaves_nothing_behind(
    machine: Machine, engine: Engine, fault: str, message: str
) -> None:
    machine.faults.add(fault)
    with pytest.raises(RunError, match=message):
        backend.load(engine, target_of())


def test_the_log_of_a_second_session_is_its_own_while_the_first_lives(
    machine: Machine, engine: Engine
) -> None:
    first = backend.load(engine, target_of())
    machine.faults.add("deserialize")
    with pytest.raises(RunError, match="Version tag does not match"):
        backend.load(engine, target_of())
    first.close()


def test_an_engine_that_fails_later_is_an_error_too(machine: Machine, engine: Engine) -> None:
    session = backend.load(engine, target_of(("cuda_graph", "off")))
    machine.faults.add("execute")
    with pytest.raises(RunError, match="illegal memory access"):
        session.sample()
    session.close()


def test_full_memory_is_told_with_what_to_do(machine: Machine, engine: Engine) -> None:
    machine.cuda.failing["cudaMalloc"] = "cudaErrorMemoryAllocation"
    with pytest.raises(RunError, match=r"cudaMalloc failed with cudaErrorMemoryAllocation .*target\.batch"):
        backend.load(engine, target_of())


def test_another_batch_than_the_engines_is_refused_with_both_shapes(machine: Machine, engine: Engine) -> None:
    with pytest.raises(RunError, match=r"-1x3x16x16, the target has 9x3x16x16 .*Supplied dimension"):
        backend.load(engine, target_of(batch=9))


def test_images_of_another_shape_are_refused_with_both_shapes(machine: Machine, engine: Engine) -> None:
    session = backend.load(engine, target_of())
    with pytest.raises(RunError, match=r"4x3x16x16.*2x3x9x9"):
        session.run(np.zeros((2, 3, 9, 9), np.float32))
    session.close()


def test_a_network_that_takes_fp16_images_is_refused(machine: Machine, onnx: Path, tmp_path: Path) -> None:
    proto = onnx_package.load(onnx)
    for value in (*proto.graph.input, *proto.graph.output):
        value.type.tensor_type.elem_type = onnx_package.TensorProto.FLOAT16
    weight = onnx_package.numpy_helper.to_array(proto.graph.initializer[0]).astype(np.float16)
    proto.graph.initializer[0].CopyFrom(onnx_package.numpy_helper.from_array(weight, "w0"))
    half = tmp_path / "half.onnx"
    onnx_package.save(proto, half)
    engine = backend.build(half, target_of(), tmp_path)
    with pytest.raises(RunError, match="images is HALF, not FLOAT"):
        backend.load(engine, target_of())


def test_closing_twice_releases_everything_once(machine: Machine, engine: Engine) -> None:
    session = backend.load(engine, target_of())
    assert isinstance(session, TensorrtSession)
    held = [weakref.ref(thing) for thing in (session._context, session._engine, session._runtime)]
    assert machine.cuda.live() == {"memory": 4, "streams": 1, "events": 4, "executables": 1}
    session.close()
    session.close()
    gc.collect()
    assert [reference() for reference in held] == [None, None, None]


def test_layers_are_shown_as_json(machine: Machine, engine: Engine) -> None:
    found = json.loads(backend.layers(engine, target_of()))
    assert [layer["LayerType"] for layer in found["Layers"][:-1]] == ["Conv", "GlobalAveragePool", "Flatten"]
    assert found["Context"]


def test_layers_tell_their_median_times_to_a_profiler_without_a_graph(
    machine: Machine, engine: Engine
) -> None:
    machine.cuda.calls.clear()
    found = backend.layer_times(engine, target_of(), repeats=5)
    assert [layer.kind for layer in found] == ["Conv", "GlobalAveragePool", "Flatten", "layer"]
    assert [layer.ms for layer in found] == pytest.approx([0.1, 0.2, 0.3, 0.4])
    assert found[0].name == "x0 kernel"
    assert "cudaStreamBeginCapture" not in machine.cuda.calls


def test_a_timed_session_tells_no_profiler(machine: Machine, engine: Engine) -> None:
    session = backend.load(engine, target_of())
    assert isinstance(session, TensorrtSession)
    session.sample()
    assert session._context.profiler is None
    session.close()
