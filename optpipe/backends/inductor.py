"""AOTInductor: an engine that ships with torch, on the CPU and on CUDA.

The engine is a package that torch compiles ahead of time from an exported program: machine code for this
processor or GPU, with the weights inside. It may not run on another one.

What it takes care of:

- a package trusts the strides of its inputs and gives wrong numbers for others without a word, so a session
  hands it its own contiguous buffer and nothing else;
- the number of OpenMP threads is written into the code when it is compiled and read from the calling thread
  when a library's kernel runs: it is set to the target's around both, and given back after;
- where the weights happen to lie in memory decides several percent of the time: they start at the same
  place in a page in every session;
- fp32 is true fp32: TF32 is off while compiling and while running.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import subprocess
import time
from pathlib import Path
from typing import Literal

from optpipe.backends import _cuda, _nvml, _processor
from optpipe.backends._engine import checked_bytes, engine_of
from optpipe.errors import MissingError, UsageError
from optpipe.files import write_atomically
from optpipe.types import Engine, Fingerprint, Precision, Session, Target

SOURCE: Literal["onnx", "program"] = "program"
CACHES_BUILDS = True
INT8_REST: Literal["fp32", "fp16"] = "fp32"

_OPTIONS = {"cpu": {"freezing": True, "max_autotune": False}}
_OPTIONS["cuda"] = {**_OPTIONS["cpu"], "cuda_graph": True}
_SWITCH = {"on": True, "true": True, "off": False, "false": False}


def precisions(device: str) -> tuple[Precision, ...]:
    """The precisions in which packages run on ``device``; bf16 where the processor has it natively."""
    if device == "cuda":
        return ("fp32", "fp16")
    if device != "cpu":
        return ()
    import torch

    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return ("fp32", "bf16") if native else ("fp32",)


def missing(target: Target) -> str | None:
    """What this machine lacks to run ``target`` and how to mend it; None if nothing.

    Raises UsageError for a target that this backend runs on no machine.
    """
    _check_target(target)
    if target.device == "cuda" and (lacking := _missing_gpu() or _missing_headers()):
        return lacking
    if _compiler() is None:
        return (
            "AOTInductor needs a C++ compiler and finds none: install g++ (apt install g++), "
            "or set the environment variable CXX to one"
        )
    return None


def fingerprint(target: Target) -> Fingerprint:
    """The device, its driver, torch and the C++ compiler, with the number of threads used.

    Raises:
        MissingError: the target's device is not there.
    """
    import torch

    release = str(torch.__version__)
    versions = [("inductor", release), ("torch", release), ("compiler", _compiler_version())]
    threads = _processor.threads_or_all(target.threads)
    if target.device == "cpu":
        model, stepping = _processor.processor()
        versions.append(("processor", stepping))
        return Fingerprint(
            model, _processor.operating_system(), tuple(versions), threads, _processor.governor()
        )
    if lacking := _missing_gpu():
        raise MissingError(lacking)
    properties = torch.cuda.get_device_properties()
    versions += [
        ("cuda", str(torch.version.cuda)),
        ("cudnn", str(torch.backends.cudnn.version())),  # type: ignore[no-untyped-call]
        ("compute capability", f"{properties.major}.{properties.minor}"),
    ]
    driver = _nvml.driver_version() or _cuda.driver()
    return Fingerprint(properties.name, driver, tuple(versions), threads, _nvml.highest_clocks())


def build(source: Path, target: Target, folder: Path) -> Engine:
    """Compile a ``torch.export`` program to ``folder/engine.pt2``.

    Raises:
        UsageError: this backend does not run the target.
        MissingError: there is no compiler, or no GPU.
        RunError: the program cannot be read, compiled or written, or is of another shape.
    """
    if lacking := missing(target):
        raise MissingError(lacking)
    from optpipe.backends._inductor_compile import compiled

    begin = time.perf_counter()
    switches = _switches(target)
    package = compiled(source, target, freezing=switches["freezing"], max_autotune=switches["max_autotune"])
    engine = folder / "engine.pt2"
    write_atomically(engine, package)
    flags = tuple((name, "on" if on else "off") for name, on in switches.items())
    return engine_of(engine, time.perf_counter() - begin, flags=flags)


def load(engine: Engine, target: Target) -> Session:
    """Open a package for running and timing.

    Raises:
        UsageError: this backend does not run the target.
        MissingError: the target's GPU is not there.
        RunError: the file is not the one that was built, or torch cannot open or run it.
    """
    _check_target(target)
    if target.device == "cuda" and (lacking := _missing_gpu()):
        raise MissingError(lacking)
    content = checked_bytes(engine)
    from optpipe.backends._inductor_sessions import CpuSession, CudaSession

    if target.device == "cpu":
        return CpuSession(content, engine.path, target)
    return CudaSession(content, engine.path, target, cuda_graph=_switches(target)["cuda_graph"])


def _check_target(target: Target) -> None:
    supported = precisions(target.device)
    if not supported:
        raise UsageError(
            f"target.device = {target.device!r}: the inductor backend runs on the CPU and on NVIDIA GPUs; "
            'set device = "cpu" or "cuda"'
        )
    if target.precision not in supported:
        raise UsageError(
            f"target.precision = {target.precision!r}: the inductor backend runs {', '.join(supported)} "
            f"on this machine's {target.device!r}; set one of these"
        )
    if target.batch < 1 or (target.threads is not None and target.threads < 1):
        raise UsageError(
            f"target.batch = {target.batch}, target.threads = {target.threads}: both must be at least 1"
        )
    _switches(target)


def _switches(target: Target) -> dict[str, bool]:
    """The target's options over the device's defaults; UsageError for one that is unknown."""
    switches = dict(_OPTIONS[target.device])
    for name, value in target.options:
        if name not in switches:
            known = ", ".join(switches)
            raise UsageError(
                f"target.options.{name} = {value!r}: on {target.device!r} the inductor backend has {known}; "
                "set one of these, or remove it"
            )
        if value.lower() not in _SWITCH:
            raise UsageError(f'target.options.{name} = {value!r}: it is a switch; set "on" or "off"')
        switches[name] = _SWITCH[value.lower()]
    return switches


def _missing_gpu() -> str | None:
    """Why torch cannot use a GPU here and how to mend it; None if it can."""
    import torch

    if torch.version.cuda is None:
        return (
            f"torch {torch.__version__} is built without CUDA: "
            "install a build with it, as https://pytorch.org/get-started says"
        )
    if torch.cuda.is_available():
        return None
    return (
        f"torch {torch.__version__} finds no NVIDIA GPU: check with nvidia-smi that the driver is installed "
        f"and serves CUDA {torch.version.cuda}, and that CUDA_VISIBLE_DEVICES does not hide the GPU"
    )


def _missing_headers() -> str | None:
    """What the code around CUDA's kernels cannot be compiled without, and how to mend it; None if nothing."""
    from torch.utils import cpp_extension

    with contextlib.suppress(OSError):  # torch knows no CUDA_HOME
        if any((Path(folder) / "cuda_runtime.h").is_file() for folder in cpp_extension.include_paths("cuda")):
            return None
    import torch

    return (
        "AOTInductor needs CUDA's headers and finds no cuda_runtime.h: "
        f"install the CUDA toolkit {torch.version.cuda}, and set CUDA_HOME to its folder in the environment"
    )


def _compiler() -> str | None:
    """The C++ compiler that torch would call: the one named by CXX, else g++."""
    command = shlex.split(os.environ.get("CXX", "")) or ["g++"]  # it may name a cache before the compiler
    return shutil.which(command[0])


def _compiler_version() -> str:
    """The compiler's own first line; empty where there is none."""
    compiler = _compiler()
    if compiler is None:
        return ""
    try:
        answer = subprocess.run(
            [compiler, "--version"], capture_output=True, text=True, timeout=30, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return ""
    return answer.splitlines()[0] if answer else ""
