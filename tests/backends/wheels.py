"""Packages that a test only looks into: pip installs them into a cache folder of their own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

import pytest


@cache
def folder_with(requirement: str) -> Path:
    """A folder with a package ("name==version") to put on PYTHONPATH; skips where it cannot be had."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser())
    python = f"py{sys.version_info.major}{sys.version_info.minor}"
    folder = root / "optpipe" / "tests" / f"{requirement.replace('==', '-')}-{python}"
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        fetched = Path(temporary) / "fetched"
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        command += ["--no-deps", "--retries", "1", "--timeout", "20", "--target", str(fetched), requirement]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode:
            pytest.skip(f"pip cannot install {requirement}: {' '.join(result.stderr.split())[-200:]}")
        try:
            fetched.rename(folder)
        except OSError:  # another run was quicker
            shutil.rmtree(fetched)
    return folder
