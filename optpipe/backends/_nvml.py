"""An NVIDIA GPU's clocks, temperature and driver through NVML: read, never set.

All of it is None or empty where nvidia-ml-py is not installed or NVML does not answer: a measurement is then
still one, without the state of the device beside it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, TypeVar

from optpipe.backends import _cuda
from optpipe.types import DeviceState

T = TypeVar("T")

_REASONS = (
    ("nvmlClocksEventReasonSwPowerCap", "power cap"),
    ("nvmlClocksEventReasonHwSlowdown", "hardware slowdown"),
    ("nvmlClocksEventReasonSyncBoost", "sync boost with a slower GPU"),
    ("nvmlClocksEventReasonSwThermalSlowdown", "temperature, by the driver"),
    ("nvmlClocksEventReasonHwThermalSlowdown", "temperature, by the hardware"),
    ("nvmlClocksEventReasonHwPowerBrakeSlowdown", "power brake"),
    ("nvmlClocksEventReasonDisplayClockSetting", "display clock setting"),
)
"""What holds the clocks below what the load asks for.

Two reasons are left out. A GPU without work lowers its clocks because nothing asks for more. Clocks that an
administrator has fixed are the same in every measurement: that steadies it instead of spoiling it.
"""


def state() -> DeviceState | None:
    """The clocks, temperature, power and throttling of the current CUDA device now; None if unreadable."""
    return _ask(_state)


def driver_version() -> str | None:
    """The version of the NVIDIA driver, "580.65.06" say; None if unreadable."""
    return _ask(lambda nvml, _: str(nvml.nvmlSystemGetDriverVersion()))


def highest_clocks() -> str:
    """The highest clocks of the current CUDA device, which do not change; empty if unreadable."""
    return _ask(_highest_clocks) or ""


def _ask(question: Callable[[Any, Any], T]) -> T | None:
    """What NVML answers on the current CUDA device; None where it does not.

    The device is found by its place on the bus: NVML counts all GPUs of the machine, CUDA only those in
    CUDA_VISIBLE_DEVICES, and in another order.
    """
    try:
        nvml: Any = importlib.import_module("pynvml")
        bus_id = _cuda.device().bus_id
    except (ImportError, _cuda.CudaError):
        return None
    try:
        nvml.nvmlInit()
        try:
            return question(nvml, nvml.nvmlDeviceGetHandleByPciBusId(bus_id))
        finally:
            nvml.nvmlShutdown()
    except nvml.NVMLError:
        return None


def _state(nvml: Any, gpu: Any) -> DeviceState:
    return DeviceState(
        sm_clock_mhz=int(nvml.nvmlDeviceGetClockInfo(gpu, nvml.NVML_CLOCK_SM)),
        memory_clock_mhz=int(nvml.nvmlDeviceGetClockInfo(gpu, nvml.NVML_CLOCK_MEM)),
        temperature_c=int(nvml.nvmlDeviceGetTemperature(gpu, nvml.NVML_TEMPERATURE_GPU)),
        power_w=_power_w(nvml, gpu),
        throttle=_throttle(nvml, gpu),
    )


def _highest_clocks(nvml: Any, gpu: Any) -> str:
    sm_clock = nvml.nvmlDeviceGetMaxClockInfo(gpu, nvml.NVML_CLOCK_SM)
    memory_clock = nvml.nvmlDeviceGetMaxClockInfo(gpu, nvml.NVML_CLOCK_MEM)
    return f"SM up to {sm_clock} MHz, memory up to {memory_clock} MHz"


def _power_w(nvml: Any, gpu: Any) -> float | None:
    try:
        return float(nvml.nvmlDeviceGetPowerUsage(gpu)) / 1000
    except nvml.NVMLError:  # not every GPU has a sensor
        return None


def _throttle(nvml: Any, gpu: Any) -> tuple[str, ...]:
    try:
        bits = nvml.nvmlDeviceGetCurrentClocksEventReasons(gpu)
    except nvml.NVMLError:
        try:
            bits = nvml.nvmlDeviceGetCurrentClocksThrottleReasons(gpu)  # its name before driver 535
        except nvml.NVMLError:
            return ()
    return tuple(words for name, words in _REASONS if bits & getattr(nvml, name))
