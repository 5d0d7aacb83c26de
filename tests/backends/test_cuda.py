"""CUDA's memory, streams, events and graphs, on a GPU that is not there and with the real bindings."""

from __future__ import annotations

import importlib
import re
import sys
from typing import Any

import numpy as np
import pytest
from fake_tensorrt import StrictError
from fake_tensorrt_cuda import COPY_MS, FakeCuda

from optpipe.backends import _cuda
from optpipe.errors import RunError


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    found = FakeCuda()
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", found)
    return found


def no_gpu_here() -> bool:
    runtime: Any = importlib.import_module("cuda.bindings.runtime")
    return int(runtime.cudaGetDeviceCount()[0]) != 0


def test_the_real_bindings_say_why_there_is_no_gpu() -> None:
    if not no_gpu_here():
        pytest.skip("this machine has a GPU")
    problem = str(_cuda.device_problem())
    assert "driver" in problem or "GPU" in problem
    with pytest.raises(_cuda.CudaError, match=r"^cudaMalloc failed with cudaError\w+ \(.+\); "):
        _cuda.DeviceBuffer(4)
    with pytest.raises(_cuda.CudaError, match=r"^cudaStreamCreateWithFlags failed with"):
        _cuda.Stream()
    with pytest.raises(_cuda.CudaError, match="failed with"):
        _cuda.device()


def test_bindings_that_are_not_installed_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", None)
    assert _cuda.device_problem() == (
        "the package cuda-python is not installed: pip install 'optpipe[nvidia]'"
    )


@pytest.mark.parametrize(
    ("error", "served", "problem"),
    [
        ("cudaErrorNoDevice", 13020, r"no GPU is visible: check nvidia-smi and CUDA_VISIBLE_DEVICES"),
        ("cudaErrorInsufficientDriver", 0, "no NVIDIA driver is installed"),
        (
            "cudaErrorInsufficientDriver",
            12040,
            r"driver serves CUDA 12\.4 and CUDA 13\.5 is installed: update",
        ),
        ("cudaErrorSystemNotReady", 13020, r"CUDA finds no GPU \(cudaErrorSystemNotReady\)"),
    ],
)
def test_each_reason_for_no_gpu_is_told_apart(
    gpu: FakeCuda, monkeypatch: pytest.MonkeyPatch, error: str, served: int, problem: str
) -> None:
    gpu.failing["cudaGetDeviceCount"] = error
    monkeypatch.setattr(FakeCuda, "_cudaDriverGetVersion", lambda self: (served,))
    assert re.search(problem, str(_cuda.device_problem()))


def test_the_device_has_a_name_a_capability_and_a_place_on_the_bus(gpu: FakeCuda) -> None:
    assert _cuda.device_problem() is None
    assert _cuda.device() == _cuda.Device("NVIDIA Test 100", "9.0", "0000:3B:00.0", "13.2", "13.5")


def test_a_driver_is_known_by_the_cuda_that_it_serves(gpu: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    assert _cuda.driver() == "CUDA 13.2"
    monkeypatch.setattr(FakeCuda, "_cudaDriverGetVersion", lambda self: (0,))
    assert _cuda.driver() == "unknown"
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", None)
    assert _cuda.driver() == "unknown"


def test_what_is_copied_to_the_gpu_and_back_is_the_same_once_waited_for(gpu: FakeCuda) -> None:
    stream, there, back = _cuda.Stream(), _cuda.HostBuffer((2, 3)), _cuda.HostBuffer((2, 3))
    device = _cuda.DeviceBuffer(there.nbytes)
    there.array[:] = np.arange(6, dtype=np.float32).reshape(2, 3)
    back.array[:] = 0
    _cuda.copy_to_device(there, device, stream)
    _cuda.copy_to_host(device, back, stream)
    assert not back.array.any()
    stream.synchronize()
    np.testing.assert_array_equal(back.array, there.array)
    for thing in (there, back, device, stream):
        thing.close()
        thing.close()
    assert gpu.live() == {}


def test_a_stream_is_idle_once_its_work_is_done(gpu: FakeCuda) -> None:
    stream, host = _cuda.Stream(), _cuda.HostBuffer((4,))
    assert stream.idle()
    _cuda.copy_to_device(host, _cuda.DeviceBuffer(host.nbytes), stream)
    assert not stream.idle()
    stream.synchronize()
    assert stream.idle()
    gpu.failing["cudaStreamQuery"] = "cudaErrorLaunchFailure"
    with pytest.raises(_cuda.CudaError, match="cudaStreamQuery failed with cudaErrorLaunchFailure"):
        stream.idle()


def test_events_measure_what_lies_between_them(gpu: FakeCuda) -> None:
    stream, host = _cuda.Stream(), _cuda.HostBuffer((4,))
    device = _cuda.DeviceBuffer(host.nbytes)
    start, end = _cuda.Event(), _cuda.Event()
    start.record(stream)
    _cuda.copy_to_device(host, device, stream)
    _cuda.copy_to_device(host, device, stream)
    end.record(stream)
    with pytest.raises(_cuda.CudaError, match="cudaEventElapsedTime failed with cudaErrorNotReady"):
        _cuda.elapsed_ms(start, end)
    end.synchronize()
    assert _cuda.elapsed_ms(start, end) == 2 * COPY_MS


def test_a_graph_does_again_what_was_recorded_and_recording_does_nothing(gpu: FakeCuda) -> None:
    stream, host = _cuda.Stream(), _cuda.HostBuffer((4,))
    device, back = _cuda.DeviceBuffer(host.nbytes), _cuda.HostBuffer((4,))

    def enqueue() -> bool:
        _cuda.copy_to_device(host, device, stream)
        _cuda.copy_to_host(device, back, stream)
        return True

    back.array[:] = 0
    graph = _cuda.capture(stream, enqueue)
    stream.synchronize()
    assert not back.array.any()
    for value in (1, 2):
        host.array[:] = value
        graph.launch(stream)
        stream.synchronize()
        assert (back.array == value).all()
    graph.close()
    graph.close()
    assert {"graphs", "executables"} & set(gpu.live()) == set()


@pytest.mark.parametrize("case", ["refused", "raised", "cudaStreamEndCapture", "cudaGraphInstantiate"])
def test_a_recording_that_fails_leaves_a_stream_that_works_and_nothing_else(gpu: FakeCuda, case: str) -> None:
    stream, host = _cuda.Stream(), _cuda.HostBuffer((4,))
    device = _cuda.DeviceBuffer(host.nbytes)
    if case.startswith("cuda"):
        gpu.failing[case] = "cudaErrorStreamCaptureInvalidated"

    def enqueue() -> bool:
        if case == "raised":
            raise RunError("the layer cannot be recorded")
        return case != "refused"

    with pytest.raises(_cuda.CaptureError) as caught:
        _cuda.capture(stream, enqueue)
    expected = {"refused": "could not be enqueued while recording", "raised": "the layer cannot be recorded"}
    assert expected.get(case, "cudaErrorStreamCaptureInvalidated") in str(caught.value)
    assert {"graphs", "executables"} & set(gpu.live()) == set()
    _cuda.copy_to_device(host, device, stream)
    stream.synchronize()


def test_a_failure_names_the_call_the_error_and_what_to_do(gpu: FakeCuda) -> None:
    gpu.failing["cudaMallocHost"] = "cudaErrorMemoryAllocation"
    with pytest.raises(_cuda.CudaError) as caught:
        _cuda.HostBuffer((1,))
    assert str(caught.value) == (
        "cudaMallocHost failed with cudaErrorMemoryAllocation (out of memory); the GPU's memory is full: "
        "close what else uses it, or lower target.batch"
    )
    assert caught.value.name == "cudaErrorMemoryAllocation"


def test_releasing_hides_no_earlier_failure(gpu: FakeCuda) -> None:
    buffer = _cuda.DeviceBuffer(4)
    gpu.failing["cudaFree"] = "cudaErrorLaunchFailure"
    buffer.close()


def test_the_stand_in_refuses_what_the_bindings_do_not_have(gpu: FakeCuda) -> None:
    with pytest.raises(StrictError):
        gpu.cudaMallocEverything(4)
    with pytest.raises(TypeError):
        gpu.cudaMalloc(4, 4)
    with pytest.raises(StrictError):
        gpu.cudaMalloc(4.0)
    with pytest.raises(StrictError):
        gpu.cudaStreamSynchronize(0)


@pytest.mark.gpu
def test_a_real_gpu_copies_times_and_replays() -> None:
    if problem := _cuda.device_problem():
        pytest.skip(problem)
    stream, host, back = _cuda.Stream(), _cuda.HostBuffer((1024,)), _cuda.HostBuffer((1024,))
    device, start, end = _cuda.DeviceBuffer(host.nbytes), _cuda.Event(), _cuda.Event()

    def enqueue() -> bool:
        _cuda.copy_to_device(host, device, stream)
        _cuda.copy_to_host(device, back, stream)
        return True

    graph = _cuda.capture(stream, enqueue)
    host.array[:] = np.arange(1024)
    start.record(stream)
    graph.launch(stream)
    end.record(stream)
    end.synchronize()
    np.testing.assert_array_equal(back.array, host.array)
    assert _cuda.elapsed_ms(start, end) > 0
    for thing in (graph, start, end, device, host, back, stream):
        thing.close()
