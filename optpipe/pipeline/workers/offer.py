"""What this machine and a Ray cluster offer a run with workers, for ``optpipe doctor --workers``."""

from __future__ import annotations

import os
import platform
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from optpipe import tune
from optpipe.environment import Finding
from optpipe.errors import MissingError
from optpipe.pipeline.workers.cluster import join
from optpipe.version import __version__

Facts = tuple[str, str, str, bool, bool]
"""Python's, torch's and optpipe's versions, native bfloat16, and whether a file of the driver is there."""


def examine(address: str | None, folder: Path) -> list[Finding]:
    """How many workers and devices fit here, and each node of the cluster at ``address`` with what it lacks.

    Whether a node sees ``folder`` is tried with a file that is written there and removed again.
    """
    cores = os.cpu_count() or 1
    share = f'workers = "local:{cores}" gives each a core; more than one core is needed to gain anything'
    found = [Finding("this machine", True, f"{cores} cores; {share}"), *_devices()]
    try:
        found.append(Finding("ray", True, version("ray")))
    except PackageNotFoundError:
        mend = "pip install 'optpipe[ray]'"
        return [*found, Finding("ray", False, "is not installed", mend, needed=address is not None)]
    if address is None:
        return found
    try:
        ray = join(address)
    except MissingError as error:
        return [*found, Finding(f"cluster at {address}", False, str(error), needed=True)]
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".optpipe-seen-") as seen:
            found += [_node(ray, node, seen.name) for node in ray.nodes() if node["Alive"]]
    finally:
        ray.shutdown()
    return found


def _devices() -> list[Finding]:
    """How many devices can share a recovery, and the package that they need for it."""
    count = torch.cuda.device_count()
    shown = (
        f"{count} GPU{'s' * (count != 1)}; devices = {count} trains a recovery on all of them"
        if count
        else "no GPU that torch can use; processes of one CPU share its cores, and gain nothing by devices"
    )
    try:
        package = Finding("lightning-fabric", True, version("lightning-fabric"))
    except PackageNotFoundError:
        mend = "pip install 'optpipe[multi]'"
        package = Finding("lightning-fabric", False, "is not installed; needed by devices above 1", mend)
    return [Finding("devices", True, shown), package]


def _node(ray: Any, node: dict[str, Any], seen: str) -> Finding:
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    has = node["Resources"]
    holds = f"{has.get('CPU', 0):g} cores, {has.get('GPU', 0):g} GPUs"
    subject = f"node {node['NodeManagerHostname']} ({node['NodeID'][:8]})"
    if not has.get("CPU"):
        return Finding(subject, True, f"{holds}: takes no workers")
    there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
    asked = ray.remote(num_cpus=0, scheduling_strategy=there)(facts).remote(seen)
    try:
        answered: Facts = ray.get(asked, timeout=60)
    except ray.exceptions.RayError as error:
        lacks = " ".join(str(error).split())[:200]
        return Finding(
            subject, False, f"{holds}; {lacks}", "install optpipe there, of the same version", True
        )
    lacks, mend = _lacks(answered, facts(seen))
    return Finding(subject, not lacks, f"{holds}{'; ' if lacks else ''}{lacks}", mend, needed=True)


def facts(seen: str) -> Facts:
    """What must be equal on all machines of a run, and whether this one sees the file ``seen``."""
    return (
        platform.python_version(),
        version("torch"),
        __version__,
        tune.native_bf16("cpu"),
        Path(seen).exists(),
    )


def _lacks(there: Facts, here: Facts) -> tuple[str, str]:
    """What is wrong with a node, and its mend; empty where nothing is."""
    names = ("Python", "torch", "optpipe")
    for name, theirs, ours in zip(names, there[:3], here[:3], strict=True):
        if theirs != ours:
            return f"has {name} {theirs}, this machine {ours}", f"install {name} {ours} there"
    if there[3] != here[3]:
        which = "has" if there[3] else "lacks"
        return (
            f"{which} bfloat16 instructions, unlike this machine, and would train otherwise",
            '[recover] autocast = "off" makes both train alike',
        )
    if not there[4]:
        mend = "start runs in a folder that all machines share, or give [run] store an address"
        return "does not see this folder", mend
    return "", ""
