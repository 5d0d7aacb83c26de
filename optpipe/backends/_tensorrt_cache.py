"""The timing cache: how long each kernel took, so that later builds need not time it again.

There is one file for each GPU model and TensorRT release. All builds share it, also those of other runs and
of other processes at the same time: it is replaced as a whole, and what others added meanwhile is taken over.
It only saves time, so nothing that goes wrong with it stops a build.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from optpipe.backends import _cuda
from optpipe.errors import RunError
from optpipe.files import write_atomically


def default_path(version: str) -> Path:
    """Where the cache of the current GPU and of a TensorRT release lies."""
    device = _cuda.device()
    name = f"{device.name} sm{device.capability} tensorrt {version}"
    root = Path(os.environ.get("XDG_CACHE_HOME", ""))
    folder = root if root.is_absolute() else Path("~/.cache").expanduser()
    return folder / "optpipe" / "tensorrt" / f"{re.sub(r'[^A-Za-z0-9.]+', '-', name)}.cache"


class TimingCache:
    """A cache file that a builder's configuration was given. ``notes`` say where that did not go well."""

    def __init__(self, config: Any, path: Path) -> None:
        self.path = path
        self.notes: list[str] = []
        self._config = config
        self._read = self._content()
        if self._read and _set(config, self._read):
            return
        if self._read:
            self.notes.append(
                f"the timing cache {path} is damaged, or of another GPU or TensorRT: it is begun anew"
            )
        # Where even an empty one is refused, TensorRT keeps what it learns for this one build.
        _set(config, b"")

    def save(self) -> None:
        """Write what the build added, together with what others wrote meanwhile."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with _locked(self.path):
                content = self._grown()
                if content is not None:
                    write_atomically(self.path, content)
        except RunError as error:
            self.notes.append(f"the timing cache is not kept: {error}")
        except OSError as error:
            self.notes.append(f"the timing cache {self.path} cannot be written: {error.strerror}")

    def _grown(self) -> bytes | None:
        cache = self._config.get_timing_cache()
        if cache is None:
            return None
        found = self._content()
        if found and found != self._read:
            other = _create(self._config, found)
            if other is not None and other.combine(cache, ignore_mismatch=False):
                cache = other
        memory = cache.serialize()
        content = b"" if memory is None else bytes(memory)
        return content if content and content != found else None

    def _content(self) -> bytes:
        try:
            return self.path.read_bytes()
        except FileNotFoundError:
            return b""
        except OSError as error:
            self.notes.append(f"the timing cache {self.path} cannot be read: {error.strerror}")
            return b""


def _set(config: Any, content: bytes) -> bool:
    cache = _create(config, content)
    return cache is not None and bool(config.set_timing_cache(cache, ignore_mismatch=False))


def _create(config: Any, content: bytes) -> Any:
    try:
        return config.create_timing_cache(content)
    except RuntimeError:
        return None


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.with_name(f"{path.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
