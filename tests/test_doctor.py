"""``optpipe doctor``: each missing piece with its mend, and the self-test where all is there."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from optpipe import environment, plugins, selftest
from optpipe.backends import onnxruntime as cpu
from optpipe.cli import main
from optpipe.errors import RunError
from optpipe.types import Engine, Fingerprint, Target


@pytest.fixture(autouse=True)
def own_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))  # others may be measuring meanwhile


def only(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """Leave only these backends, so that no test compiles or imports what it is not about."""
    monkeypatch.setattr(plugins, "names", lambda room: list(names))


def driver(
    monkeypatch: pytest.MonkeyPatch, *, init: int = 0, served: int = 13020, gpus: int = 1, there: bool = True
) -> None:
    """libcuda as it answers on a machine with so many GPUs."""

    def fill(value: int) -> Callable[[object], int]:
        def call(pointer: object) -> int:
            ctypes.cast(pointer, ctypes.POINTER(ctypes.c_int))[0] = value  # type: ignore[arg-type]
            return 0

        return call

    def load(name: str) -> SimpleNamespace:
        if not there:
            raise OSError(f"{name}: cannot open shared object file")
        return SimpleNamespace(
            cuInit=lambda flags: init, cuDriverGetVersion=fill(served), cuDeviceGetCount=fill(gpus)
        )

    monkeypatch.setattr(ctypes, "CDLL", load)


def test_where_a_run_was_executed_is_named_with_what_decides_its_latency() -> None:
    found = Fingerprint("a device", "580.1", (("tensorrt", "10.16"), ("onnxruntime", "9.9")), 1)
    assert environment.describe(found).executed_on == "a device, 1 thread"
    assert environment.describe(replace(found, threads=2)).executed_on == "a device, 2 threads"
    on_gpu = environment.describe(found, "cuda")
    assert on_gpu.executed_on == "a device, driver 580.1"
    assert (on_gpu.versions["tensorrt"], on_gpu.versions["onnxruntime"]) == ("10.16", "9.9")


def gpu_findings() -> dict[str, environment.Finding]:
    return {finding.subject: finding for finding in environment.examine_gpu()}


@pytest.mark.parametrize(
    ("machine", "detail"),
    [
        ({"there": False}, "not installed"),
        ({"init": 100}, "finds no GPU (CUDA error 100)"),
        ({"gpus": 0}, "finds no GPU"),
    ],
)
def test_a_machine_without_a_gpu_lacks_what_is_needed(
    monkeypatch: pytest.MonkeyPatch, machine: dict[str, Any], detail: str
) -> None:
    only(monkeypatch)
    driver(monkeypatch, **machine)
    found = gpu_findings()["NVIDIA driver"]
    assert (found.fine, found.needed, found.detail) == (False, True, detail)
    assert "nvidia-smi" in found.mend


def test_a_driver_says_what_it_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    only(monkeypatch)
    driver(monkeypatch, gpus=2)
    assert gpu_findings()["NVIDIA driver"].detail == "serves CUDA 13.2 on 2 GPUs"


def test_each_missing_package_is_named_with_the_command_that_mends_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    only(monkeypatch)
    for module in ("tensorrt", "cuda.bindings.runtime", "pynvml"):
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setenv("CXX", "no-such-compiler -O2")
    found = gpu_findings()
    for subject in ("tensorrt", "cuda-bindings", "nvidia-ml-py"):
        assert not found[subject].fine
        assert found[subject].mend == "pip install 'optpipe[nvidia]'"
    assert found["C++ compiler"].detail == "no-such-compiler is not there"
    assert found["C++ compiler"].mend.startswith("apt install g++")


def test_the_onnxruntime_for_the_cpu_has_to_go_first(monkeypatch: pytest.MonkeyPatch) -> None:
    only(monkeypatch)
    runtime = SimpleNamespace(__version__="1.25", get_available_providers=lambda: ["CPUExecutionProvider"])
    monkeypatch.setitem(sys.modules, "onnxruntime", runtime)
    found = gpu_findings()["onnxruntime-gpu"]
    assert found.detail == "onnxruntime 1.25 is the one for the CPU"
    assert found.mend == "pip uninstall -y onnxruntime; pip install 'optpipe[nvidia]'"
    runtime.get_available_providers = lambda: ["CUDAExecutionProvider"]
    assert gpu_findings()["onnxruntime-gpu"].fine


def test_tensorrt_without_its_libraries_says_which(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    only(monkeypatch)
    broken = tmp_path / "tensorrt.py"
    broken.write_text(
        "raise ImportError('libnvinfer.so.11: cannot open shared object file')", encoding="utf-8"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
    found = gpu_findings()["tensorrt"]
    assert "libnvinfer.so.11" in found.detail
    assert "LD_LIBRARY_PATH" in found.mend


def test_the_cpus_backends_are_listed_without_those_of_a_gpu() -> None:
    subjects = [finding.subject for finding in environment.examine(Path.cwd())]
    assert {"backend onnxruntime", "backend openvino", "backend inductor"} <= set(subjects)
    assert "backend tensorrt" not in subjects


# ---------------------------------------------------------------- the self-test


def test_the_self_test_builds_each_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    only(monkeypatch, "onnxruntime")
    found = list(selftest.check("cpu"))
    assert [finding.subject for finding in found] == [
        "self-test onnxruntime fp32",
        "self-test onnxruntime int8",
    ]
    for finding in found:
        assert finding.fine, finding
        assert "logits within " in finding.detail
        assert "Latency " in finding.detail


def test_an_engine_that_computes_something_else_fails_the_self_test(monkeypatch: pytest.MonkeyPatch) -> None:
    only(monkeypatch, "onnxruntime")
    load = cpu.load

    def wrong(engine: Engine, target: Target) -> object:
        session = load(engine, target)
        return SimpleNamespace(run=lambda images: session.run(images) + 9, close=session.close)

    monkeypatch.setattr(cpu, "load", wrong)
    first, *_ = selftest.check("cpu")
    assert (first.fine, first.needed) == (False, True)
    assert first.detail.startswith("the engine differs from torch by up to 9")


def test_an_engine_that_fails_as_no_engine_should_is_a_finding_and_the_next_is_tried(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    only(monkeypatch, "onnxruntime")
    load = cpu.load

    def broken(engine: Engine, target: Target) -> object:
        if target.precision == "fp32":
            raise TypeError("incompatible function arguments\n  1. (self)")
        return load(engine, target)

    monkeypatch.setattr(cpu, "load", broken)
    first, second = selftest.check("cpu")
    assert (first.fine, first.needed) == (False, True)
    assert first.detail == "TypeError: incompatible function arguments 1. (self)"
    assert second.fine


def test_a_backend_that_does_not_load_is_not_tested(monkeypatch: pytest.MonkeyPatch) -> None:
    only(monkeypatch, "onnxruntime", "tensorrt")
    monkeypatch.setattr(cpu, "missing", lambda target: "not today")
    assert list(selftest.check("cpu")) == []


# ---------------------------------------------------------------- the command


def doctor(*arguments: str) -> int | str | None:
    with pytest.raises(SystemExit) as ended:
        main(["doctor", *arguments])
    return ended.value.code


def test_doctor_gpu_ends_with_3_where_nothing_runs_on_a_gpu(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    only(monkeypatch)
    driver(monkeypatch, there=False)
    assert doctor("--gpu") == 3
    out, err = capsys.readouterr()
    assert "missing NVIDIA driver: not installed; install the driver for your GPU" in out
    assert err == "Error: not fine: NVIDIA driver, GPU engines\n"


def gpu_backend(monkeypatch: pytest.MonkeyPatch, problem: str = "") -> None:
    """The onnxruntime backend as if it ran on a GPU; its engines compute on the CPU."""
    module = ModuleType("there")
    on_cpu = Target("onnxruntime", selftest.BATCH, selftest.SHAPE, threads=1)

    def build(source: Path, target: Target, folder: Path) -> Engine:
        if problem:
            raise RunError(problem)
        return cpu.build(source, on_cpu, folder)

    members = {
        "SOURCE": "onnx",
        "INT8_REST": "fp32",
        "precisions": lambda device: ("fp32",) if device == "cuda" else (),
        "missing": lambda target: None,
        "build": build,
        "load": lambda engine, target: cpu.load(engine, on_cpu),
    }
    vars(module).update(members)
    only(monkeypatch, "there")
    monkeypatch.setattr(plugins, "backend", lambda name: module)


def test_doctor_gpu_tests_what_is_there_and_a_lesser_lack_is_no_failure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    driver(monkeypatch)
    gpu_backend(monkeypatch)
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    main(["doctor", "--gpu"])
    out, err = capsys.readouterr()
    assert err == ""
    assert "missing tensorrt: not installed; pip install 'optpipe[nvidia]'" in out
    assert "ok      GPU engines: built by there" in out
    assert "ok      self-test there fp32: built in 0.0 s, logits within " in out


def test_a_self_test_that_fails_ends_with_3(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    driver(monkeypatch)
    gpu_backend(monkeypatch, "the builder gave up")
    assert doctor("--gpu") == 3
    out, err = capsys.readouterr()
    assert "failed  self-test there fp32: the builder gave up" in out
    assert err == "Error: not fine: self-test there fp32\n"


@pytest.mark.slow
def test_every_backend_of_this_machine_passes_on_the_cpu() -> None:
    found = list(selftest.check("cpu"))
    assert [finding for finding in found if not finding.fine] == []
    assert "self-test inductor fp32" in [finding.subject for finding in found]


@pytest.mark.gpu
def test_every_backend_of_this_machine_passes_on_the_gpu() -> None:
    found = list(selftest.check("cuda"))
    assert found
    assert [finding for finding in found if not finding.fine] == []
