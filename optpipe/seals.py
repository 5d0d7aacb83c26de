"""Files that show when they were damaged: each carries the sha256 of what is in it.

A disk, a copy or a hand may change a digit and leave a file that reads well. JSON that optpipe reads back
ends with a key ``seal``; tensors carry their digest in the file's metadata; an array ends with it. What has
no digest, because an older optpipe or somebody else wrote it, is taken as it is.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

METADATA = "optpipe.sha256"
"""The key of the digest in the metadata of a safetensors file."""
DIGEST = hashlib.sha256().digest_size
"""Bytes at the end of an array's file."""
_END = "\n}\n"
_SEAL = re.compile(rb',\n "seal": "(.{64})"\n}\n\Z', re.DOTALL)
_CHUNK = 1 << 20


class DamagedError(ValueError):
    """A file that does not hold what was written to it."""


def sealed(text: str) -> str:
    """Indented JSON of an object, with the sha256 of all of it as its last key."""
    assert text.endswith(_END) and not text.startswith("{}")
    digest = hashlib.sha256(text.encode()).hexdigest()
    return f'{text.removesuffix(_END)},\n "seal": "{digest}"{_END}'


def check(text: bytes) -> None:
    """DamagedError where a text's seal is not that of the text before it."""
    found = _SEAL.search(text)
    if found is None:
        return
    written = text[: found.start()] + _END.encode()
    if hashlib.sha256(written).hexdigest().encode() != found[1]:
        raise DamagedError("it is not what was written: the seal at its end is of another content")


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file.

    Raises:
        DamagedError: it is no such file, or its tensors are not those that were written.
        OSError: it cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    with path.open("rb"):  # what cannot be opened is told of by the system's own words
        pass
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
    except SafetensorError as error:
        raise DamagedError(str(error)) from None
    if METADATA in metadata and metadata[METADATA] != tensors_sha256(tensors):
        raise DamagedError("its tensors are not those that were written")
    return tensors


def is_whole(path: Path) -> bool:
    """Whether a safetensors file is there and holds what was written to it."""
    try:
        read_tensors(path)
    except (FileNotFoundError, NotADirectoryError, DamagedError):
        return False
    return True


def tensors_sha256(tensors: Mapping[str, torch.Tensor]) -> str:
    """sha256 over names, types, shapes and values, whatever their order."""
    import torch

    whole = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        whole.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        whole.update(flat.view(torch.uint8).numpy().data)
    return whole.hexdigest()


def ends_with_digest(path: Path) -> bool:
    """Whether a file's last bytes are the sha256 of those before them.

    Raises:
        OSError: it cannot be read.
    """
    whole, left = hashlib.sha256(), path.stat().st_size - DIGEST
    if left < 0:
        return False
    with path.open("rb") as file:
        while left > 0:
            piece = file.read(min(left, _CHUNK))
            if not piece:
                return False
            whole.update(piece)
            left -= len(piece)
        return file.read() == whole.digest()
