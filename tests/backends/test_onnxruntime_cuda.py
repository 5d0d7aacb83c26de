"""ONNX Runtime on CUDA: what is handed to the provider, and what is refused.

A stand-in takes the GPU's place: ONNX Runtime computes on the CPU, in memory that poses as the GPU's, and
every argument that the CUDA provider would be given is checked. The conformance tests run the provider itself
where there is a GPU.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from optpipe.backends import _cuda, _nvml, _onnxruntime_cuda
from optpipe.backends import onnxruntime as backend
from optpipe.backends._engine import engine_of
from optpipe.errors import MissingError, RunError, UsageError
from optpipe.onnx_export import export
from optpipe.types import Engine, Target

ort = pytest.importorskip("onnxruntime")

SHAPE = (3, 8, 8)
TARGET = Target("onnxruntime", 2, SHAPE, device="cuda")
STREAM = 0x7F00


@pytest.fixture(scope="module")
def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 3)).eval()


@pytest.fixture(scope="module")
def engine(network: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    path = tmp_path_factory.mktemp("onnx") / "model.onnx"
    export(network, SHAPE, 2, path)
    return engine_of(path, 0.0)


# ---------------------------------------------------------------- the stand-in


class Memory:
    """Host memory in the place of the GPU's and of page-locked memory."""

    open = 0

    def __init__(self, size: int | tuple[int, ...]) -> None:
        shape = size if isinstance(size, tuple) else (size // 4,)
        self.array: NDArray[np.float32] = np.zeros(shape, np.float32)
        self.nbytes = self.array.nbytes
        self.pointer = self.array.ctypes.data
        Memory.open += 1

    def close(self) -> None:
        Memory.open -= 1


class Stream:
    open = 0

    def __init__(self) -> None:
        self.handle = STREAM
        Stream.open += 1

    def synchronize(self) -> None: ...

    def idle(self) -> bool:
        return False

    def close(self) -> None:
        Stream.open -= 1


class Event:
    def record(self, stream: Stream) -> None:
        assert isinstance(stream, Stream)

    def synchronize(self) -> None: ...

    def close(self) -> None: ...


def copy(source: Memory, sink: Memory, stream: Stream) -> None:
    assert source.nbytes == sink.nbytes
    ctypes.memmove(sink.pointer, source.pointer, source.nbytes)


class SessionOptions(ort.SessionOptions):  # type: ignore[misc, name-defined]
    """Takes note of the entry that would forbid the CPU on which the stand-in computes."""

    def add_session_config_entry(self, key: str, value: str) -> None:
        if (key, value) == ("session.disable_cpu_ep_fallback", "1"):
            self.cpu_forbidden = True
            return
        super().add_session_config_entry(key, value)


class Binding:
    """An IOBinding that only takes addresses on the GPU, and gives them to the CPU."""

    def __init__(self, real: Any) -> None:
        self.real = real

    def bind_input(self, name: str, device: str, number: int, kind: type, shape: list[int], at: int) -> None:
        assert (device, number, kind) == ("cuda", 0, np.float32)
        self.real.bind_input(name, "cpu", 0, kind, shape, at)

    def bind_output(self, name: str, device: str, number: int, kind: type, shape: list[int], at: int) -> None:
        assert (device, number, kind) == ("cuda", 0, np.float32)
        self.real.bind_output(name, "cpu", 0, kind, shape, at)


@dataclass
class Seen:
    """What the stand-in was given, and how it is to behave."""

    settings: list[dict[str, str]] = field(default_factory=list)
    cpu_forbidden: list[bool] = field(default_factory=list)
    waits: list[bool] = field(default_factory=list)
    fallback_disabled: int = 0
    providers: tuple[str, ...] = ("CUDAExecutionProvider", "CPUExecutionProvider")
    used: dict[str, str] = field(default_factory=dict)
    refuses: Callable[[dict[str, str]], str] = lambda settings: ""


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    seen = Seen()
    real = ort.InferenceSession

    class Session(real):  # type: ignore[misc, valid-type]
        """Computes on the CPU what it is told to run on CUDA."""

        def __init__(
            self, content: bytes, options: Any, *, providers: Sequence[Any], enable_fallback: int = 1
        ) -> None:
            self.cuda = isinstance(providers[0], tuple)
            if self.cuda:
                assert enable_fallback == 0
                ((name, settings),) = providers
                assert name == "CUDAExecutionProvider"
                assert all(isinstance(value, str) for value in settings.values())
                seen.settings.append(settings)
                seen.cpu_forbidden.append(getattr(options, "cpu_forbidden", False))
                if reason := seen.refuses(settings):
                    raise RuntimeError(reason)
            super().__init__(content, options, providers=["CPUExecutionProvider"])

        def get_providers(self) -> list[str]:
            return list(seen.providers)

        def get_provider_options(self) -> dict[str, dict[str, str]]:
            return {
                "CUDAExecutionProvider": {**seen.settings[-1], "has_user_compute_stream": "1", **seen.used}
            }

        def disable_fallback(self) -> None:
            seen.fallback_disabled += 1

        def io_binding(self) -> Binding:
            return Binding(super().io_binding())

        def run_with_iobinding(self, binding: Binding, options: Any = None) -> None:
            entry = "disable_synchronize_execution_providers"
            seen.waits.append(options is None or options.get_run_config_entry(entry) != "1")
            super().run_with_iobinding(binding.real, options)

    monkeypatch.setattr(ort, "InferenceSession", Session)
    monkeypatch.setattr(ort, "SessionOptions", SessionOptions)
    monkeypatch.setattr(ort, "preload_dlls", lambda: None, raising=False)
    monkeypatch.setattr(ort, "get_available_providers", lambda: list(seen.providers))
    stand_ins = {
        "Stream": Stream,
        "Event": Event,
        "HostBuffer": Memory,
        "DeviceBuffer": Memory,
        "copy_to_device": copy,
        "copy_to_host": copy,
        "elapsed_ms": lambda start, end: 1.5,
        "device_problem": lambda: None,
        "device": lambda: _cuda.Device("a GPU", "9.0", "0000:01:00.0", "13.0", "13.0"),
    }
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(_cuda, name, stand_in)
    monkeypatch.setattr(_nvml, "state", lambda: None)
    monkeypatch.setattr(Memory, "open", 0)
    monkeypatch.setattr(Stream, "open", 0)
    return seen


# ---------------------------------------------------------------- how a network is run


def test_the_provider_gets_true_fp32_the_stream_and_a_graph(seen: Seen, engine: Engine) -> None:
    session = backend.load(engine, TARGET)
    (settings,) = seen.settings
    assert settings == {
        "device_id": "0",
        "user_compute_stream": str(STREAM),
        "do_copy_in_default_stream": "1",
        "use_tf32": "0",
        "cudnn_conv_algo_search": "EXHAUSTIVE",
        "cudnn_conv_use_max_workspace": "1",
        "prefer_nhwc": "0",
        "enable_cuda_graph": "1",
    }
    assert seen.cpu_forbidden == [True]
    assert seen.fallback_disabled == 1
    assert (session.headline, session.notes) == ("GPU Compute Time", ("CUDA graph",))
    session.close()


def test_logits_come_through_the_bound_buffers(seen: Seen, engine: Engine, network: nn.Module) -> None:
    session = backend.load(engine, TARGET)
    images = np.random.default_rng(0).standard_normal((5, *SHAPE), dtype=np.float32)
    with torch.inference_mode():
        expected = network(torch.from_numpy(images)).numpy()
    np.testing.assert_allclose(session.run(images), expected, atol=1e-5)
    session.close()


def test_only_the_first_runs_wait_for_the_gpu(seen: Seen, engine: Engine) -> None:
    session = backend.load(engine, TARGET)
    assert seen.waits == [True] * 3 + [False] * 3
    sample = session.sample()
    assert seen.waits[6:] == [False]
    assert (sample.compute_ms, sample.h2d_ms, sample.d2h_ms) == (1.5, 1.5, 1.5)
    assert sample.enqueue_ms is not None
    assert sample.enqueue_ms > 0
    session.close()


def test_a_release_that_waits_after_each_run_is_noted_and_its_wait_is_no_enqueue_time(
    seen: Seen, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Stream, "idle", lambda self: True)
    session = backend.load(engine, TARGET)
    assert session.notes == ("CUDA graph", "each run waits for the GPU, which is part of its time")
    assert session.sample().enqueue_ms is None
    session.close()
    # Work so short that it is done now and then before it is looked at does not mean that the run waits.
    answers = iter([True, False, True])
    monkeypatch.setattr(Stream, "idle", lambda self: next(answers))
    session = backend.load(engine, TARGET)
    assert session.notes == ("CUDA graph",)
    assert session.sample().enqueue_ms is not None
    session.close()


def test_options_switch_the_graph_and_the_layout(seen: Seen, engine: Engine) -> None:
    session = backend.load(engine, replace(TARGET, options=(("cuda_graph", "off"), ("prefer_nhwc", "on"))))
    (settings,) = seen.settings
    assert (settings["enable_cuda_graph"], settings["prefer_nhwc"]) == ("0", "1")
    assert session.notes == ("no CUDA graph: target.options.cuda_graph is off", "NHWC layout")
    session.close()


def test_a_network_that_cannot_be_recorded_runs_without_a_graph_and_says_why(
    seen: Seen, engine: Engine
) -> None:
    seen.refuses = lambda settings: "no such\n  node" if settings["enable_cuda_graph"] == "1" else ""
    session = backend.load(engine, TARGET)
    assert session.notes == ("no CUDA graph: no such node",)
    assert session.run(np.zeros((1, *SHAPE), np.float32)).shape == (1, 3)
    session.close()


def test_all_is_released_when_closed_and_when_opening_fails(seen: Seen, engine: Engine) -> None:
    session = backend.load(engine, TARGET)
    assert (Stream.open, Memory.open) == (1, 4)
    session.close()
    session.close()
    assert (Stream.open, Memory.open) == (0, 0)
    seen.refuses = lambda settings: "out of memory"
    with pytest.raises(RunError, match="out of memory"):
        backend.load(engine, TARGET)
    assert (Stream.open, Memory.open) == (0, 0)


# ---------------------------------------------------------------- no silent fall-back


def test_a_session_without_the_cuda_provider_is_an_error(seen: Seen, engine: Engine) -> None:
    session = backend.load(engine, TARGET)
    session.close()
    seen.providers = ("CPUExecutionProvider", "CUDAExecutionProvider")
    with pytest.raises(RunError, match=r"would run it on CPUExecutionProvider, .* instead of the GPU"):
        backend.load(engine, TARGET)


@pytest.mark.parametrize(
    "used", [{"use_tf32": "1"}, {"has_user_compute_stream": "0"}, {"enable_cuda_graph": "0"}], ids=str
)
def test_a_provider_that_ignores_a_setting_is_an_error(
    seen: Seen, engine: Engine, used: dict[str, str]
) -> None:
    seen.used = used
    ((name, value),) = used.items()
    with pytest.raises(RunError, match=f"{name} = {value}"):
        backend.load(engine, TARGET)


def test_a_network_of_which_a_part_would_run_on_the_cpu_is_refused(seen: Seen, engine: Engine) -> None:
    seen.refuses = lambda settings: (
        "graph nodes that are assigned to the default CPU EP, but fallback to CPU EP"
    )
    with pytest.raises(RunError, match="only a part of it on the GPU, or its CUDA provider did not start"):
        backend.load(engine, TARGET)


def test_the_entry_that_forbids_the_cpu_is_one_that_onnxruntime_obeys(engine: Engine) -> None:
    """The name of a session's entry is not checked by ONNX Runtime; a misspelt one would do nothing."""
    options = _onnxruntime_cuda._session_options()
    with pytest.raises(Exception, match="fallback to CPU EP has been explicitly disabled"):
        ort.InferenceSession(engine.path.read_bytes(), options, enable_fallback=0)


# ---------------------------------------------------------------- what is missing


def test_a_package_without_the_provider_is_named_with_the_commands_that_mend_it(
    monkeypatch: pytest.MonkeyPatch, engine: Engine
) -> None:
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CPUExecutionProvider"])
    installed = {"onnxruntime": "1.0", "onnxruntime-gpu": "1.0"}
    monkeypatch.setattr(importlib.metadata, "version", lambda name: installed[name])
    text = str(backend.missing(TARGET))
    assert "onnxruntime and onnxruntime-gpu" in text
    assert "has no CUDA provider; the packages onnxruntime and onnxruntime-gpu hide each other" in text
    assert text.endswith("pip uninstall -y onnxruntime onnxruntime-gpu, then pip install 'optpipe[nvidia]'")
    with pytest.raises(MissingError, match="no CUDA provider"):
        backend.load(engine, TARGET)


def test_an_absent_package_is_named_with_the_command_that_installs_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    expected = "the package onnxruntime-gpu is not installed: pip install 'optpipe[nvidia]'"
    assert backend.missing(TARGET) == expected


def test_cudas_missing_libraries_are_named(
    seen: Seen, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert backend.missing(TARGET) is None

    def preload() -> None:
        print("Failed to load libcublas.so.13: libcublas.so.13: cannot open shared object file")
        print("Please follow the page to install CUDA.")

    monkeypatch.setattr(ort, "preload_dlls", preload)
    monkeypatch.setattr(ort, "cuda_version", "13.0", raising=False)
    version = ort.__version__
    assert backend.missing(TARGET) == (
        f"onnxruntime-gpu {version} needs CUDA 13.0, of which these are missing: libcublas.so.13; "
        f"pip install 'onnxruntime-gpu[cuda,cudnn]=={version}'"
    )
    assert capsys.readouterr().out == ""


def test_a_library_that_is_found_at_its_second_place_is_not_missing(
    seen: Seen, monkeypatch: pytest.MonkeyPatch
) -> None:
    def preload() -> None:
        print("Failed to load /site-packages/nvidia/libcublas.so.13: libcublasLt.so.13: cannot open")

    monkeypatch.setattr(ort, "preload_dlls", preload)
    assert backend.missing(TARGET) is None


def test_a_provider_that_is_a_plug_in_is_there_once_the_libraries_are_loaded(
    seen: Seen, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen.providers = ("CPUExecutionProvider",)

    def preload() -> None:
        seen.providers = ("CUDAExecutionProvider", "CPUExecutionProvider")

    monkeypatch.setattr(ort, "preload_dlls", preload)
    assert backend.missing(TARGET) is None


def test_why_a_plug_in_cannot_be_loaded_reaches_the_user(seen: Seen, monkeypatch: pytest.MonkeyPatch) -> None:
    seen.providers = ("CPUExecutionProvider",)
    reason = "Failed to register bundled CUDA plugin EP from libonnxruntime_providers_cuda.so: no symbol"
    monkeypatch.setattr(ort, "preload_dlls", lambda: warnings.warn(reason, stacklevel=1))
    assert backend.missing(TARGET) == f"{reason}: pip install 'optpipe[nvidia]'"


def test_a_machine_without_a_gpu_says_so(seen: Seen, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_cuda, "device_problem", lambda: "no NVIDIA GPU is visible")
    assert backend.missing(TARGET) == "no NVIDIA GPU is visible"


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (replace(TARGET, precision="int8"), r"target\.precision = 'int8': .*fp32, fp16 on 'cuda'"),
        (
            replace(TARGET, options=(("use_tf32", "on"),)),
            r"options\.use_tf32 = 'on': .*cuda_graph, prefer_nhwc",
        ),
        (
            replace(TARGET, options=(("cuda_graph", "maybe"),)),
            r"cuda_graph = 'maybe': must be \"on\" or \"off\"",
        ),
        (
            replace(TARGET, device="cpu", options=(("cuda_graph", "on"),)),
            r"options\.cuda_graph = 'on': on 'cpu'",
        ),
    ],
)
def test_a_target_it_cannot_serve_is_a_usage_error(target: Target, message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        backend.missing(target)
    with pytest.raises(UsageError, match=message):
        backend.build(tmp_path / "model.onnx", target, tmp_path)


def test_fingerprint_names_the_gpu_and_the_release(seen: Seen, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_nvml, "driver_version", lambda: "580.1")
    monkeypatch.setattr(_nvml, "highest_clocks", lambda: "SM up to 1980 MHz")
    found = backend.fingerprint(TARGET)
    assert (found.device, found.driver, found.threads) == ("a GPU", "580.1", 1)
    assert dict(found.versions)["onnxruntime"] == ort.__version__
    assert dict(found.versions)["compute capability"] == "9.0"
