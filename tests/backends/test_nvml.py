"""A GPU's clocks through NVML: read where they can be, None where not."""
# ruff: noqa: N815  # names of the real package

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from types import ModuleType
from typing import Any

import pytest
from fake_tensorrt_cuda import FakeCuda
from wheels import folder_with

from optpipe.backends import _cuda, _nvml
from optpipe.types import DeviceState

POWER_CAP, IDLE, APPLICATION_CLOCKS, HOT = 0x4, 0x1, 0x2, 0x40


class FakeNvmlError(Exception):
    pass


class FakeNvml(ModuleType):
    """The module ``pynvml`` with one GPU; calls in ``failing`` raise, calls made are in ``calls``."""

    NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_TEMPERATURE_GPU = 1, 2, 0
    NVMLError = FakeNvmlError
    nvmlClocksEventReasonSwPowerCap = 0x4
    nvmlClocksEventReasonHwSlowdown = 0x8
    nvmlClocksEventReasonSyncBoost = 0x10
    nvmlClocksEventReasonSwThermalSlowdown = 0x20
    nvmlClocksEventReasonHwThermalSlowdown = 0x40
    nvmlClocksEventReasonHwPowerBrakeSlowdown = 0x80
    nvmlClocksEventReasonDisplayClockSetting = 0x100

    def __init__(self, reasons: int = 0) -> None:
        super().__init__("pynvml")
        self.failing: set[str] = set()
        self.calls: list[tuple[Any, ...]] = []
        self._answers = {
            "nvmlInit": None,
            "nvmlShutdown": None,
            "nvmlDeviceGetHandleByPciBusId": "gpu",
            "nvmlDeviceGetClockInfo": 1755,
            "nvmlDeviceGetMaxClockInfo": 1980,
            "nvmlDeviceGetTemperature": 61,
            "nvmlDeviceGetPowerUsage": 312_500,
            "nvmlDeviceGetCurrentClocksEventReasons": reasons,
            "nvmlDeviceGetCurrentClocksThrottleReasons": reasons,
            "nvmlSystemGetDriverVersion": "580.65.06",
        }

    def __getattr__(self, name: str) -> Any:
        answer = self._answers[name]

        def call(*args: Any) -> Any:
            self.calls.append((name, *args))
            if name in self.failing:
                raise FakeNvmlError(name)
            return answer

        return call


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> FakeNvml:
    found = FakeNvml()
    monkeypatch.setitem(sys.modules, "pynvml", found)
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", FakeCuda())
    return found


def test_the_state_is_that_of_the_cuda_device_by_its_place_on_the_bus(nvml: FakeNvml) -> None:
    assert _nvml.state() == DeviceState(1755, 1755, 61, 312.5, ())
    assert ("nvmlDeviceGetHandleByPciBusId", "0000:3B:00.0") in nvml.calls
    assert ("nvmlDeviceGetClockInfo", "gpu", FakeNvml.NVML_CLOCK_MEM) in nvml.calls
    assert nvml.calls[-1] == ("nvmlShutdown",)


@pytest.mark.parametrize(
    ("reasons", "words"),
    [
        (0, ()),
        (IDLE | APPLICATION_CLOCKS, ()),
        (POWER_CAP | IDLE, ("power cap",)),
        (POWER_CAP | HOT, ("power cap", "temperature, by the hardware")),
    ],
)
def test_only_what_holds_the_clocks_below_the_load_counts_as_throttling(
    nvml: FakeNvml, reasons: int, words: tuple[str, ...]
) -> None:
    nvml._answers["nvmlDeviceGetCurrentClocksEventReasons"] = reasons
    found = _nvml.state()
    assert found is not None
    assert found.throttle == words


def test_an_older_driver_has_the_reasons_under_another_name(nvml: FakeNvml) -> None:
    nvml.failing.add("nvmlDeviceGetCurrentClocksEventReasons")
    nvml._answers["nvmlDeviceGetCurrentClocksThrottleReasons"] = POWER_CAP
    found = _nvml.state()
    assert found is not None
    assert found.throttle == ("power cap",)


def test_a_gpu_without_a_power_sensor_still_has_a_state(nvml: FakeNvml) -> None:
    nvml.failing.add("nvmlDeviceGetPowerUsage")
    found = _nvml.state()
    assert found is not None
    assert found.power_w is None


@pytest.mark.parametrize("call", ["nvmlInit", "nvmlDeviceGetHandleByPciBusId", "nvmlDeviceGetClockInfo"])
def test_where_nvml_fails_there_is_no_state(nvml: FakeNvml, call: str) -> None:
    nvml.failing.add(call)
    assert _nvml.state() is None


def test_driver_and_highest_clocks_are_the_same_from_call_to_call(nvml: FakeNvml) -> None:
    assert _nvml.driver_version() == _nvml.driver_version() == "580.65.06"
    assert _nvml.highest_clocks() == "SM up to 1980 MHz, memory up to 1980 MHz"
    nvml.failing |= {"nvmlSystemGetDriverVersion", "nvmlDeviceGetMaxClockInfo"}
    assert (_nvml.driver_version(), _nvml.highest_clocks()) == (None, "")


def test_without_the_package_there_is_nothing_to_read(
    nvml: FakeNvml, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert (_nvml.state(), _nvml.driver_version(), _nvml.highest_clocks()) == (None, None, "")


def test_the_stand_in_has_only_what_the_real_package_has(nvml: FakeNvml) -> None:
    code = (
        "import sys, inspect, pynvml\n"
        "for name in sys.argv[1:]:\n"
        "    member = getattr(pynvml, name)\n"
        "    print(name, len(inspect.signature(member).parameters) if callable(member) else member)\n"
    )
    names = [*nvml._answers, *(name for name in vars(FakeNvml) if name.startswith(("NVML_", "nvmlClocks")))]
    environment = {**os.environ, "PYTHONPATH": str(folder_with("nvidia-ml-py==13.615.71"))}
    command = [sys.executable, "-c", code, *names]
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert result.returncode == 0, result.stderr
    real = dict(line.split() for line in result.stdout.splitlines())
    arguments = {"nvmlDeviceGetClockInfo": 2, "nvmlDeviceGetMaxClockInfo": 2, "nvmlDeviceGetTemperature": 2}
    arguments |= {"nvmlInit": 0, "nvmlShutdown": 0, "nvmlSystemGetDriverVersion": 0}
    for name in names:
        own = arguments.get(name, 1) if name in nvml._answers else getattr(FakeNvml, name)
        assert int(real[name]) == own, name


@pytest.mark.gpu
def test_a_real_gpu_has_clocks() -> None:
    if problem := _cuda.device_problem():
        pytest.skip(problem)
    try:
        importlib.import_module("pynvml")
    except ImportError:
        pytest.skip("the package nvidia-ml-py is not installed")
    found = _nvml.state()
    assert found is not None
    assert found.sm_clock_mhz > 0
    assert found.memory_clock_mhz > 0
    assert 0 < found.temperature_c < 120
    assert _nvml.driver_version()
