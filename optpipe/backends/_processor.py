"""The processor that CPU engines run on: its name, its cores, its clocks."""

from __future__ import annotations

import os
import platform
from pathlib import Path


def threads_or_all(threads: int | None) -> int:
    """The number of threads asked for, or one for each processor."""
    return threads or os.cpu_count() or 1


def processor() -> tuple[str, str]:
    """The processor's name, and what tells two of the same name apart (virtual machines hide the rest)."""
    fields: dict[str, str] = {}
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            key, _, value = line.partition(":")
            fields.setdefault(key.strip(), value.strip())
    except OSError:
        pass  # not Linux
    name = fields.get("model name") or platform.processor() or platform.machine()
    known = [f"{key} {fields[key]}" for key in ("cpu family", "model", "stepping") if key in fields]
    return name, ", ".join(known) or platform.machine()


def operating_system() -> str:
    """The system's name and release, which stand where a GPU has its driver."""
    return f"{platform.system()} {platform.release()}"


def governor() -> str:
    """The frequency governor; empty where the system does not say."""
    try:
        path = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
        return f"governor {path.read_text(encoding='utf-8').strip()}"
    except OSError:
        return ""


def own_cores(threads: int) -> list[int]:
    """A core for each thread but the calling one; empty where they cannot have their own."""
    if not hasattr(os, "sched_getaffinity"):
        return []
    cores: dict[str, int] = {}
    for core in sorted(os.sched_getaffinity(0)):
        # Hardware threads of one core would share it: one of them is enough.
        cores.setdefault(_siblings(core), core)
    own = list(cores.values())[1:threads]
    return own if len(own) == threads - 1 else []


def _siblings(core: int) -> str:
    try:
        path = Path(f"/sys/devices/system/cpu/cpu{core}/topology/thread_siblings_list")
        return path.read_text(encoding="utf-8").strip()
    except OSError:
        return str(core)
