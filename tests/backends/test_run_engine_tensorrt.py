"""The bundle's program on TensorRT and PyCUDA, neither of which is there: strict stand-ins for both."""

from __future__ import annotations

import ctypes
import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnxruntime
import pytest
from conftest import WriteOnnx
from fake_tensorrt import RELEASES, StrictError
from fake_tensorrt_cuda import COPY_MS, FakeCuda, StreamState
from fake_tensorrt_runtime import COMPUTE_MS, LINES, Machine

from optpipe.deploy import run_engine

SHAPE = (4, 3, 16, 16)


class Driver(ModuleType):
    """``pycuda.driver``: what the program uses of it, as PyCUDA's own wrapper declares it.

    Memory and streams are those of the GPU that the TensorRT stand-in runs on.
    """

    class Error(Exception):
        """The base of all that PyCUDA raises."""

    def __init__(self, cuda: FakeCuda) -> None:
        super().__init__("pycuda.driver")
        self._cuda = cuda
        self.streams: list[PycudaStream] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise StrictError(f"pycuda.driver.{name} is not simulated, or does not exist")

    def Stream(self) -> PycudaStream:  # noqa: N802
        self.streams.append(PycudaStream(self._cuda))
        return self.streams[-1]

    def Event(self) -> PycudaEvent:  # noqa: N802
        return PycudaEvent(self._cuda, self.streams)

    def pagelocked_empty(self, shape: tuple[int, ...], dtype: type) -> np.ndarray[Any, Any]:
        return np.full(shape, np.nan, dtype)

    def mem_alloc(self, nbytes: int) -> Allocation:
        assert type(nbytes) is int
        return Allocation(self._cuda, nbytes)

    def memcpy_htod_async(self, dest: Allocation, src: np.ndarray[Any, Any], stream: PycudaStream) -> None:
        assert src.flags["C_CONTIGUOUS"]
        assert src.nbytes == dest.nbytes
        self._copy(lambda: self._write(int(dest), src), stream)

    def memcpy_dtoh_async(self, dest: np.ndarray[Any, Any], src: Allocation, stream: PycudaStream) -> None:
        assert dest.nbytes == src.nbytes
        self._copy(lambda: self._read(dest, int(src)), stream)

    def _copy(self, work: Callable[[], None], stream: PycudaStream) -> None:
        def timed() -> float:
            work()
            return COPY_MS

        self._cuda.enqueue(stream.handle, timed)

    def _write(self, address: int, content: np.ndarray[Any, Any]) -> None:
        self._cuda.view(address, content.nbytes)[: content.nbytes] = content.tobytes()

    def _read(self, dest: np.ndarray[Any, Any], address: int) -> None:
        found = np.frombuffer(bytes(self._cuda.view(address, dest.nbytes)), dest.dtype)
        dest[:] = found.reshape(dest.shape)


class Allocation:
    """``DeviceAllocation``: its address is had by ``int()``."""

    def __init__(self, cuda: FakeCuda, nbytes: int) -> None:
        self._buffer = ctypes.create_string_buffer(nbytes)
        self._address, self.nbytes = ctypes.addressof(self._buffer), nbytes
        cuda.memory[self._address] = (self._buffer, nbytes, "device")

    def __int__(self) -> int:
        return self._address


class PycudaStream:
    """Work waits until an event behind it, or the stream, is waited for."""

    def __init__(self, cuda: FakeCuda) -> None:
        self._cuda = cuda
        self.handle = 1000 + len(cuda.streams)
        cuda.streams[self.handle] = StreamState()

    def drain(self) -> None:
        queue = self._cuda.streams[self.handle].queue
        while queue:
            self._cuda.clock_ms += queue.pop(0)()


class PycudaEvent:
    def __init__(self, cuda: FakeCuda, streams: list[PycudaStream]) -> None:
        self._cuda, self._streams = cuda, streams
        self.at_ms: float | None = None

    def record(self, stream: PycudaStream) -> PycudaEvent:
        def reached() -> float:
            self.at_ms = self._cuda.clock_ms
            return 0.0

        self.at_ms = None
        self._cuda.enqueue(stream.handle, reached)
        return self

    def synchronize(self) -> PycudaEvent:
        for stream in self._streams:
            stream.drain()
        return self

    def time_till(self, event: PycudaEvent) -> float:
        assert self.at_ms is not None
        assert event.at_ms is not None
        return event.at_ms - self.at_ms


@pytest.fixture(params=RELEASES)
def machine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Machine:
    found = Machine(request.param)
    found.install(monkeypatch)
    driver, package = Driver(found.cuda), ModuleType("pycuda")
    package.driver = driver  # type: ignore[attr-defined]
    context = ModuleType("pycuda.autoprimaryctx")
    for module in (package, driver, context):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return found


@pytest.fixture
def bundle(machine: Machine, write_onnx: WriteOnnx) -> Path:
    onnx = write_onnx("model.onnx", layers=2)
    shapes = {"images": [SHAPE] * 3}
    plan = machine.plan(onnx.read_bytes(), shapes)
    folder = onnx.parent
    (folder / "engine.plan").write_bytes(plan)
    target = {"batch": SHAPE[0], "input_shape": SHAPE[1:], "precision": "fp32", "device": "cuda"}
    manifest = {
        "schema": "optpipe.manifest/2",
        "target": {**target, "threads": None, "options": []},
        "preprocess": {"mean": [0.5] * 3, "std": [0.5] * 3, "size": None, "resize": "squash"},
        "files": {"engine.plan": {"sha256": hashlib.sha256(plan).hexdigest()}},
        "engines": [{"precision": "fp32", "backend": "tensorrt", "engine": "engine.plan"}],
        "built_on": {"device": "NVIDIA Other"},
    }
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    return folder


def run(bundle: Path, *arguments: str) -> int:
    return run_engine.main(["--bundle", str(bundle), "--duration", "0", "--warmUp", "0", *arguments])


def test_classes_and_times_come_from_the_plan(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (6, 16, 16, 3), dtype=np.uint8)
    np.save(bundle / "images.npy", pixels)
    assert run(bundle, str(bundle / "images.npy"), "--json") == 0
    found = json.loads(capsys.readouterr().out)
    images = (pixels.transpose(0, 3, 1, 2).astype(np.float32) / 255 - np.float32(0.5)) / np.float32(0.5)
    session = onnxruntime.InferenceSession(bundle / "model.onnx", providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {"images": images})
    assert [image["classes"] for image in found["images"]] == np.argsort(-logits, axis=1)[:, :5].tolist()
    medians = {name: figures["median"] for name, figures in found["figures_ms"].items()}
    assert 0 < medians.pop("Enqueue Time") < 1000
    assert medians == {
        "Latency": 2 * COPY_MS + COMPUTE_MS,
        "H2D Latency": COPY_MS,
        "GPU Compute Time": COMPUTE_MS,
        "D2H Latency": COPY_MS,
    }


def test_a_changed_plan_is_never_deserialized(
    machine: Machine, bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with (bundle / "engine.plan").open("ab") as file:
        file.write(b"x")
    assert run(bundle) == 1
    assert "is not opened" in capsys.readouterr().err
    assert machine.deserialized == 0
    assert machine.trt.uses == set()


@pytest.mark.parametrize("fault", ["runtime", "deserialize", "context", "input_shape", "address", "execute"])
def test_what_tensorrt_says_of_a_failure_reaches_the_user(
    machine: Machine, bundle: Path, capsys: pytest.CaptureFixture[str], fault: str
) -> None:
    machine.faults.add(fault)
    assert run(bundle) == 4
    *said, last = capsys.readouterr().err.splitlines()
    assert f"TensorRT: {LINES[fault]}" in said
    assert last.startswith("Error: tensorrt cannot run engine.plan, built on NVIDIA Other: ")
    assert last.endswith("optpipe rebuild builds the bundle's engines anew on this machine")


def test_a_machine_without_a_gpu_is_told_so(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def import_module(name: str) -> ModuleType:
        if name == "pycuda.autoprimaryctx":
            raise Driver.Error("cuInit failed")
        return sys.modules[name]

    monkeypatch.setattr("optpipe.deploy.run_engine.importlib.import_module", import_module)
    assert run(bundle) == 3
    assert capsys.readouterr().err == "Error: CUDA finds no GPU (cuInit failed): check with nvidia-smi\n"
