"""What this machine is and can do, for environment.json and ``optpipe doctor``."""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import os
import platform
import shlex
import shutil
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from optpipe import plugins
from optpipe.errors import OptpipeError
from optpipe.report.schema import EnvironmentReport
from optpipe.types import Fingerprint, Target
from optpipe.version import __version__

NVIDIA = "pip install 'optpipe[nvidia]'"
PACKAGES = ("torch", "torchvision", "onnx", "onnxscript", "onnxruntime", "numpy", "scipy", "torch-pruning")


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of ``optpipe doctor``; ``mend`` is the command or step that helps, empty when all is well.

    Without what is ``needed`` nothing runs of what was asked about.
    """

    subject: str
    fine: bool
    detail: str
    mend: str = ""
    needed: bool = False


def describe(fingerprint: Fingerprint, device: str = "cpu") -> EnvironmentReport:
    """The environment as it stands in a report, of engines on "cpu" or "cuda" with this fingerprint."""
    # A GPU's figures do not hang on the host's threads, but on its driver.
    threads = f"{fingerprint.threads} thread{'s' * (fingerprint.threads != 1)}"
    ran_with = f"driver {fingerprint.driver}" if device == "cuda" else threads
    return EnvironmentReport(
        optpipe=__version__,
        python=platform.python_version(),
        platform=platform.platform(),
        executed_on=f"{fingerprint.device}, {ran_with}",
        versions=dict(_versions()) | dict(fingerprint.versions),
    )


def examine(folder: Path) -> list[Finding]:
    """What this machine can run, and what is missing for the rest."""
    found = [Finding("python", True, platform.python_version())]
    versions = dict(_versions())
    for package in PACKAGES:
        if package in versions:
            found.append(Finding(package, True, versions[package]))
        else:
            extra = "[cpu]" if package == "onnxruntime" else ""
            found.append(Finding(package, False, "not installed", f"pip install 'optpipe{extra}'"))
    found.append(_gpu())
    found += _backends("cpu")
    free = shutil.disk_usage(folder).free / 2**30
    mend = "" if free > 2 else "free some space: a run of ResNet-50 takes about 1 GiB"
    found.append(Finding("disk", free > 2, f"{free:.0f} GiB free", mend))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found.append(Finding("cores", True, str(cores)))
    return found


def examine_gpu() -> list[Finding]:
    """What engines on an NVIDIA GPU take, each piece that is missing with what mends it."""
    found = [
        _driver(),
        _torch(),
        _tensorrt(),
        _importable("cuda-bindings", "cuda.bindings.runtime"),
        _onnxruntime(),
        _importable("nvidia-ml-py", "pynvml"),
        _compiler(),
    ]
    backends = _backends("cuda")
    ready = [finding.subject.removeprefix("backend ") for finding in backends if finding.fine]
    detail = f"built by {', '.join(ready)}" if ready else "no backend runs on the GPU"
    mend = "" if ready else "mend what is missing above"
    return [*found, *backends, Finding("GPU engines", bool(ready), detail, mend, needed=True)]


def _backends(device: str) -> list[Finding]:
    """Whether each backend that there is for a device loads on this machine."""
    found: list[Finding] = []
    for name in plugins.names("backends"):
        try:
            backend = plugins.backend(name)
            if not backend.precisions(device):
                continue
            missing = backend.missing(Target(name, batch=1, input_shape=(3, 32, 32), device=device))
        except OptpipeError as error:
            missing = str(error)
        found.append(
            Finding(f"backend {name}", not missing, "cannot run" if missing else "ready", missing or "")
        )
    return found


def _versions() -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    for package in PACKAGES:
        try:
            found.append((package, version(package)))
        except PackageNotFoundError:
            continue
    return found


def _gpu() -> Finding:
    import torch

    if torch.cuda.is_available():
        return Finding("gpu", True, torch.cuda.get_device_name())
    return Finding("gpu", False, "no NVIDIA GPU that torch can use", "a CPU is enough for onnxruntime")


def _driver() -> Finding:
    """The driver, asked without any package."""
    subject = "NVIDIA driver"
    mend = "install the driver for your GPU, then check with nvidia-smi"
    try:
        cuda = ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")
    except OSError:
        return Finding(subject, False, "not installed", mend, needed=True)
    version, count = ctypes.c_int(), ctypes.c_int()
    code = cuda.cuInit(0) or cuda.cuDriverGetVersion(ctypes.byref(version))
    code = code or cuda.cuDeviceGetCount(ctypes.byref(count))
    if code or not count.value:
        why = f"finds no GPU (CUDA error {code})" if code else "finds no GPU"
        mend = "check with nvidia-smi that there is one, and that CUDA_VISIBLE_DEVICES does not hide it"
        return Finding(subject, False, why, mend, needed=True)
    served = f"{version.value // 1000}.{version.value % 1000 // 10}"
    return Finding(subject, True, f"serves CUDA {served} on {count.value} GPU{'s' * (count.value > 1)}")


def _torch() -> Finding:
    import torch

    subject, release = "torch with CUDA", torch.__version__
    if torch.version.cuda is None:
        mend = "install a build with it, as https://pytorch.org/get-started says"
        return Finding(subject, False, f"torch {release} is built without CUDA", mend)
    if not torch.cuda.is_available():
        mend = f"install or update the NVIDIA driver: it must serve CUDA {torch.version.cuda}"
        return Finding(subject, False, f"torch {release} finds no GPU", mend)
    return Finding(
        subject, True, f"torch {release}, CUDA {torch.version.cuda}, {torch.cuda.get_device_name()}"
    )


def _tensorrt() -> Finding:
    if importlib.util.find_spec("tensorrt") is None:
        return Finding("tensorrt", False, "not installed", NVIDIA)
    try:
        return Finding("tensorrt", True, str(importlib.import_module("tensorrt").__version__))
    except (ImportError, OSError) as error:
        mend = f"{NVIDIA}, or put the folder of libnvinfer.so on LD_LIBRARY_PATH"
        return Finding("tensorrt", False, f"its libraries cannot be loaded ({error})", mend)


def _onnxruntime() -> Finding:
    subject, provider = "onnxruntime-gpu", "CUDAExecutionProvider"
    try:
        runtime = importlib.import_module("onnxruntime")
    except ImportError:
        return Finding(subject, False, "not installed", NVIDIA)
    if provider in runtime.get_available_providers():
        return Finding(subject, True, f"{runtime.__version__}, with the {provider}")
    # The two packages share a folder: the one for the CPU must go first.
    mend = f"pip uninstall -y onnxruntime; {NVIDIA}"
    return Finding(subject, False, f"onnxruntime {runtime.__version__} is the one for the CPU", mend)


def _importable(package: str, module: str) -> Finding:
    try:
        importlib.import_module(module)
    except (ImportError, OSError) as error:
        return Finding(package, False, f"cannot be imported ({error})", NVIDIA)
    try:
        return Finding(package, True, version(package))
    except PackageNotFoundError:  # installed under another name
        return Finding(package, True, "there")


def _compiler() -> Finding:
    """What AOTInductor compiles with: the compiler named by CXX, else g++."""
    command = (shlex.split(os.environ.get("CXX", "")) or ["g++"])[0]
    path = shutil.which(command)
    if path is None:
        mend = "apt install g++, or set the environment variable CXX to a compiler"
        return Finding("C++ compiler", False, f"{command} is not there", mend)
    return Finding("C++ compiler", True, path)
