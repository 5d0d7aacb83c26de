"""What this machine is and can do, for environment.json and ``optpipe doctor``."""

from __future__ import annotations

import os
import platform
import shutil
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from optpipe import __version__, plugins
from optpipe.errors import OptpipeError
from optpipe.report.schema import EnvironmentReport
from optpipe.types import Fingerprint, Target

PACKAGES = ("torch", "torchvision", "onnx", "onnxscript", "onnxruntime", "numpy", "scipy", "torch-pruning")


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of ``optpipe doctor``; ``mend`` is the command or step that helps, empty when all is well."""

    subject: str
    fine: bool
    detail: str
    mend: str = ""


def describe(fingerprint: Fingerprint) -> EnvironmentReport:
    """The environment as it stands in a report."""
    return EnvironmentReport(
        optpipe=__version__,
        python=platform.python_version(),
        platform=platform.platform(),
        executed_on=f"{fingerprint.device}, {fingerprint.threads} threads",
        versions=dict(_versions()),
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
    target = Target("", batch=1, input_shape=(3, 32, 32))
    for name in plugins.names("backends"):
        try:
            missing = plugins.backend(name).missing(target)
        except OptpipeError as error:
            missing = str(error)
        detail = "cannot run" if missing else "ready"
        found.append(Finding(f"backend {name}", not missing, detail, missing or ""))
    free = shutil.disk_usage(folder).free / 2**30
    mend = "" if free > 2 else "free some space: a run of ResNet-50 takes about 1 GiB"
    found.append(Finding("disk", free > 2, f"{free:.0f} GiB free", mend))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found.append(Finding("cores", True, str(cores)))
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
