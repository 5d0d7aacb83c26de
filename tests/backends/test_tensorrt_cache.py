"""The timing cache of the tensorrt backend: shared, replaced as a whole, and never in the way."""

from __future__ import annotations

import json
import threading
from functools import partial
from pathlib import Path

import pytest
from conftest import WriteOnnx
from fake_tensorrt import RELEASES
from fake_tensorrt_runtime import Machine

from optpipe.backends import tensorrt as backend
from optpipe.backends._tensorrt_cache import TimingCache
from optpipe.errors import RunError
from optpipe.types import Engine, Target

SHAPE = (3, 16, 16)


def target_of(*options: tuple[str, str]) -> Target:
    return Target("tensorrt", 4, SHAPE, "fp32", "cuda", options=options)


@pytest.fixture(params=RELEASES)
def machine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Machine:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    found = Machine(request.param)
    found.install(monkeypatch)
    return found


@pytest.fixture
def onnx(write_onnx: WriteOnnx) -> Path:
    return write_onnx("model.onnx")


def cache_of(engine: Engine) -> Path:
    assert engine.timing_cache is not None
    return engine.timing_cache


def keys(path: Path) -> set[str]:
    return set(json.loads(path.read_bytes())["keys"])


def test_a_second_build_times_nothing_anew(machine: Machine, onnx: Path, tmp_path: Path) -> None:
    first = backend.build(onnx, target_of(), tmp_path / "1")
    second = backend.build(onnx, target_of(), tmp_path / "2")
    assert machine.timed == [3, 0]
    assert first.timing_cache == second.timing_cache


def test_there_is_one_file_for_a_gpu_and_a_release(machine: Machine, onnx: Path, tmp_path: Path) -> None:
    found = cache_of(backend.build(onnx, target_of(), tmp_path))
    assert found.parent == tmp_path / "cache" / "optpipe" / "tensorrt"
    assert found.name == f"NVIDIA-Test-100-sm9.0-tensorrt-{machine.trt.__version__}.cache"
    assert {path.name for path in found.parent.iterdir()} == {found.name, f"{found.name}.lock"}


def test_the_recipe_may_name_another_file(machine: Machine, onnx: Path, tmp_path: Path) -> None:
    wanted = tmp_path / "own" / "timings"
    engine = backend.build(onnx, target_of(("timing_cache", str(wanted))), tmp_path)
    assert engine.timing_cache == wanted
    assert len(keys(wanted)) == 3
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("damage", ["damaged", "other device", "other release", "cache_raises"])
def test_a_cache_that_does_not_fit_is_begun_anew_and_said_so(
    machine: Machine, onnx: Path, tmp_path: Path, damage: str
) -> None:
    path = tmp_path / "timings"
    whole = machine.cache("Conv 2", "GlobalAveragePool 1", "Flatten 1")
    content = {
        "damaged": whole[:-9],
        "other device": machine.cache("Conv 2", device="NVIDIA Test 200"),
        "other release": whole.replace(machine.trt.__version__.encode(), b"10.0.0"),
    }
    path.write_bytes(content.get(damage, whole))
    machine.faults.add(damage)
    engine = backend.build(onnx, target_of(("timing_cache", str(path))), tmp_path)
    assert machine.timed == [3]
    assert any("is damaged, or of another GPU or TensorRT: it is begun anew" in note for note in engine.notes)
    machine.faults.clear()
    assert backend.build(onnx, target_of(("timing_cache", str(path))), tmp_path).notes == ()
    assert machine.timed == [3, 0]


def test_a_build_that_fails_does_not_blame_a_cache_that_was_dropped(
    machine: Machine, onnx: Path, tmp_path: Path
) -> None:
    path = tmp_path / "timings"
    path.write_bytes(b"damaged")
    machine.faults.add("build")
    with pytest.raises(RunError) as caught:
        backend.build(onnx, target_of(("timing_cache", str(path))), tmp_path)
    assert "Could not find any implementation" in str(caught.value)
    assert "timing cache" not in str(caught.value)


def test_a_cache_that_tensorrt_refuses_even_when_empty_does_not_stop_the_build(
    machine: Machine, onnx: Path, tmp_path: Path
) -> None:
    machine.faults.add("cache_refused")
    engine = backend.build(onnx, target_of(), tmp_path)
    assert engine.path.exists()
    assert engine.timing_cache is None
    assert not list(tmp_path.rglob("*.cache"))


def test_what_another_process_wrote_during_the_build_is_kept(
    machine: Machine, onnx: Path, tmp_path: Path
) -> None:
    path = tmp_path / "timings"
    path.write_bytes(machine.cache("a"))
    machine.during_build = partial(path.write_bytes, machine.cache("a", "b"))
    engine = backend.build(onnx, target_of(("timing_cache", str(path))), tmp_path)
    assert keys(path) == {"a", "b", "Conv 2", "GlobalAveragePool 1", "Flatten 1"}
    assert engine.notes == ()


def test_many_writers_at_once_leave_a_whole_file_with_what_all_learned(
    machine: Machine, tmp_path: Path
) -> None:
    path = tmp_path / "timings"
    logger = _logger(machine)
    caches = []
    for number in range(8):
        config = machine.trt.classes["Builder"](logger).create_builder_config()
        caches.append(TimingCache(config, path))
        config.get_timing_cache().behaviour.keys.add(str(number))
    threads = [threading.Thread(target=cache.save) for cache in caches]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert keys(path) == {str(number) for number in range(8)}


def test_a_cache_that_cannot_be_written_is_noted(machine: Machine, onnx: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    engine = backend.build(onnx, target_of(("timing_cache", str(tmp_path / "file" / "timings"))), tmp_path)
    assert any("cannot be written" in note for note in engine.notes)


def test_level_0_times_nothing_and_uses_no_cache(machine: Machine, onnx: Path, tmp_path: Path) -> None:
    engine = backend.build(onnx, target_of(("optimization_level", "0")), tmp_path)
    assert engine.timing_cache is None
    assert not (tmp_path / "cache").exists()


def _logger(machine: Machine) -> object:
    logger: object = machine.trt.classes["ILogger"]()
    return logger
