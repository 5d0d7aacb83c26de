"""The tensorrt backend on a real GPU with the real TensorRT."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from conftest import WriteOnnx

from optpipe.backends import tensorrt as backend
from optpipe.errors import RunError
from optpipe.types import Engine, Target

pytestmark = pytest.mark.gpu

SHAPE = (3, 32, 32)


def target_of(*options: tuple[str, str], batch: int = 4) -> Target:
    return Target("tensorrt", batch, SHAPE, "fp32", "cuda", options=options)


@pytest.fixture(autouse=True)
def needs_tensorrt(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if problem := backend.missing(target_of()):
        pytest.skip(problem)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def onnx(write_onnx: WriteOnnx) -> Path:
    return write_onnx("model.onnx", layers=3, size=32)


@pytest.fixture
def engine(needs_tensorrt: None, onnx: Path, tmp_path: Path) -> Engine:
    return backend.build(onnx, target_of(), tmp_path / "engine")


@pytest.mark.parametrize("graph", ["on", "off"])
def test_any_number_of_images_gives_onnx_runtimes_logits(onnx: Path, engine: Engine, graph: str) -> None:
    reference = onnxruntime.InferenceSession(onnx, providers=["CPUExecutionProvider"])
    session = backend.load(engine, target_of(("cuda_graph", graph)))
    assert (session.notes == ("CUDA graph",)) == (graph == "on")
    for count in (1, 4, 9):
        images = np.random.default_rng(count).standard_normal((count, *SHAPE), dtype=np.float32)
        (expected,) = reference.run(None, {"images": images})
        np.testing.assert_allclose(session.run(images), expected, rtol=1e-4, atol=1e-4)
    session.close()


def test_samples_are_times(engine: Engine) -> None:
    session = backend.load(engine, target_of())
    for _ in range(20):
        sample = session.sample()
        assert 0 < sample.compute_ms < 1000
        assert sample.enqueue_ms is not None
        assert sample.h2d_ms is not None
        assert sample.d2h_ms is not None
        assert min(sample.enqueue_ms, sample.h2d_ms, sample.d2h_ms) > 0
    session.close()


def test_two_sessions_live_side_by_side(engine: Engine) -> None:
    first, second = backend.load(engine, target_of()), backend.load(engine, target_of())
    images = np.random.default_rng(0).standard_normal((4, *SHAPE), dtype=np.float32)
    np.testing.assert_allclose(first.run(images), second.run(images), atol=1e-5)
    first.close()
    np.testing.assert_allclose(second.run(images), second.run(images), atol=1e-5)
    second.close()


def test_the_timing_cache_is_written_and_read_without_a_note(
    onnx: Path, engine: Engine, tmp_path: Path
) -> None:
    assert engine.timing_cache is not None
    assert engine.timing_cache.stat().st_size > 0
    again = backend.build(onnx, target_of(), tmp_path / "again")
    assert (engine.notes, again.notes) == ((), ())


def test_a_damaged_timing_cache_does_not_stop_a_build(onnx: Path, tmp_path: Path) -> None:
    path = tmp_path / "timings"
    path.write_bytes(b"damaged")
    engine = backend.build(onnx, target_of(("timing_cache", str(path))), tmp_path)
    assert engine.notes
    assert backend.build(onnx, target_of(("timing_cache", str(path))), tmp_path).notes == ()


def test_a_range_of_batches(onnx: Path, tmp_path: Path) -> None:
    target = target_of(("profile", "1,4,8"), batch=2)
    engine = backend.build(onnx, target, tmp_path)
    session = backend.load(engine, target)
    assert session.run(np.zeros((5, *SHAPE), np.float32)).shape == (5, 8)
    session.close()
    with pytest.raises(RunError, match="9x3x32x32"):
        backend.load(engine, target_of(batch=9))


def test_failures_carry_tensorrts_own_lines(tmp_path: Path) -> None:
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"no network")
    with pytest.raises(RunError, match=r"TensorRT cannot read .*broken\.onnx: (?!TensorRT says nothing)"):
        backend.build(broken, target_of(), tmp_path)


def test_layers_and_fingerprint_can_be_read(engine: Engine) -> None:
    assert json.loads(backend.layers(engine, target_of()))["Layers"]
    assert backend.fingerprint(target_of()) == backend.fingerprint(target_of())
