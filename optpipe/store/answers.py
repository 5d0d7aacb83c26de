"""Answers as JSON with a seal, and the digests that name them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import TypeVar

from pydantic import TypeAdapter

from optpipe import seals
from optpipe.errors import RunError

T = TypeVar("T")

_MADE_FROM = "made_from"


def to_json(value: object) -> str:
    """A frozen dataclass as indented JSON."""
    assert dataclasses.is_dataclass(value) and not isinstance(value, type)
    return json.dumps(dataclasses.asdict(value), indent=1, allow_nan=False) + "\n"


def to_sealed(value: object, made_from: str | None = None) -> str:
    """The same with a seal, by which :func:`from_json` sees whether it was damaged.

    ``made_from`` is the digest of what the value hangs on, for :func:`source_of`.
    """
    text = to_json(value)
    if made_from is not None:
        text = json.dumps({**json.loads(text), _MADE_FROM: made_from}, indent=1) + "\n"
    return seals.sealed(text)


def source_of(path: Path) -> str | None:
    """The digest of what a whole file of :func:`to_sealed` was made from; None where it does not say."""
    source = json.loads(path.read_bytes()).get(_MADE_FROM)
    return None if source is None else str(source)


def from_json(cls: type[T], text: str | bytes) -> T:
    """The dataclass that :func:`to_json` or :func:`to_sealed` wrote.

    Raises:
        ValueError: the text is no such value, or not as it was sealed.
    """
    seals.check(text.encode() if isinstance(text, str) else text)
    return TypeAdapter(cls).validate_json(text)


def digest(*parts: object) -> str:
    """sha256 over parts: dataclasses, strings, numbers, tuples and None."""

    def plain(part: object) -> object:
        if dataclasses.is_dataclass(part) and not isinstance(part, type):
            return dataclasses.asdict(part)
        return part

    text = json.dumps([plain(part) for part in parts], sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def file_sha256(path: Path) -> str:
    """sha256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_answer(path: Path, cls: type[T]) -> T | None:
    """What a file holds; None where there is none, or it is damaged or of another version.

    Raises:
        RunError: the file is there and cannot be read.
    """
    try:
        return from_json(cls, path.read_bytes())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    except OSError as error:
        raise RunError(
            f"{path}: cannot be read: {error.strerror or error}; mend or remove it and run again"
        ) from error
