"""An engine's file and its digest: what is loaded is what was built."""

from __future__ import annotations

import hashlib
from pathlib import Path

from optpipe.errors import RunError
from optpipe.types import Engine


def engine_of(
    path: Path,
    build_s: float,
    *,
    timing_cache: Path | None = None,
    flags: tuple[tuple[str, str], ...] = (),
    notes: tuple[str, ...] = (),
) -> Engine:
    """The record of an engine that was just built, with the sha256 of its file."""
    return Engine(path, _sha256(_read(path)), build_s, timing_cache, flags, notes)


def checked_bytes(engine: Engine) -> bytes:
    """The engine's file, once its sha256 is the recorded one.

    Raises:
        RunError: the file cannot be read, or it is not the one that was built.
    """
    found = _read(engine.path)
    digest = _sha256(found)
    if digest != engine.sha256:
        raise RunError(
            f"{engine.path}: sha256 is {digest[:16]}..., recorded is {engine.sha256[:16]}...: it is not the "
            "engine that was built and is not loaded; build it again"
        )
    return found


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise RunError(f"no engine at {path}: {error.strerror}; build it first") from None


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
