"""The images of an .npz that is too large for memory, read from the file one by one."""

from __future__ import annotations

import math
import os
import shutil
import tempfile
import weakref
import zipfile
from pathlib import Path
from typing import IO

import numpy as np

from optpipe.data import streaming
from optpipe.data.preparing import Pixels
from optpipe.errors import UsageError

IMAGES = "images.npy"
CHUNK = 2**20


class Rows:
    """Images of one size that lie one after the other in a file, which is closed with the last reference.

    Read, not mapped: a map of a file that another program makes shorter ends the process.
    """

    def __init__(self, where: str, descriptor: int, begin: int, shape: tuple[int, ...]) -> None:
        """``shape`` is (N, H, W, C) or (N, H, W), the first image's first byte at ``begin``."""
        self.shape = shape
        self._where = where
        self._descriptor = descriptor
        self._begin = begin
        self._image = (*shape[1:], 1) if len(shape) == 3 else shape[1:]
        weakref.finalize(self, os.close, descriptor)

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def ndim(self) -> int:
        """Of the shape."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Bytes of all images."""
        return math.prod(self.shape)

    def row(self, index: int) -> Pixels:
        """The image at an index, (H, W, C).

        Raises:
            UsageError: the file has become shorter.
        """
        length = math.prod(self._image)
        found = os.pread(self._descriptor, length, self._begin + index * length)
        if len(found) != length:
            raise UsageError(
                f"data {self._where}: ends before image {index}; while a run is at work its images must stay "
                "as they are"
            )
        return np.frombuffer(found, np.uint8).reshape(self._image)


def rows(path: Path, archive: zipfile.ZipFile) -> Rows | None:
    """The images of an .npz that are too large to be held; None where they are not, or no images at all.

    Where the file is compressed they are unpacked, once, into a temporary file without a name, which goes
    with the process whatever ends it; else they are read where they lie.

    Raises:
        UsageError: there is no room to unpack them.
        ValueError, zipfile.BadZipFile, zlib.error: the file is damaged.
    """
    if IMAGES not in archive.namelist():
        return None
    entry = archive.getinfo(IMAGES)
    with archive.open(entry) as member:
        begin, shape = _header(member)
        if shape is None or math.prod(shape) <= streaming.most_held():
            return None
        if entry.file_size != begin + math.prod(shape):
            return None  # what numpy has to say of it is said by numpy
        if entry.compress_type == zipfile.ZIP_STORED:
            while member.read(CHUNK):
                pass  # to its end, where its checksum is compared
            return Rows(
                str(path), os.open(path, os.O_RDONLY), _data_offset(path, entry.header_offset) + begin, shape
            )
        return Rows(str(path), _unpacked(member, math.prod(shape), path), 0, shape)


def _header(member: IO[bytes]) -> tuple[int, tuple[int, ...] | None]:
    """Where an array begins, and its shape; None for the shape of what are no images in C's order."""
    version = np.lib.format.read_magic(member)
    if version not in ((1, 0), (2, 0)):
        return 0, None
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(member)
    plain = dtype == np.uint8 and not fortran and len(shape) in (3, 4) and min(shape) > 0
    return member.tell(), shape if plain else None


def _data_offset(path: Path, header_offset: int) -> int:
    """Where the bytes of an archive's member begin: behind its local header, of 30 bytes and two names."""
    with path.open("rb") as file:
        file.seek(header_offset)
        local = file.read(30)
    return (
        header_offset + 30 + int.from_bytes(local[26:28], "little") + int.from_bytes(local[28:30], "little")
    )


def _unpacked(member: IO[bytes], size: int, path: Path) -> int:
    """The descriptor of a file that has the rest of a member."""
    folder = tempfile.gettempdir()
    mend = "set TMPDIR to a folder with room, or save it with np.savez, which is read where it lies"
    free = shutil.disk_usage(folder).free
    if size > free:
        raise UsageError(
            f"data {path}: is compressed, and unpacking its images into {folder} takes {size / 1e9:.1f} GB "
            f"where {free / 1e9:.1f} GB are free; {mend}"
        )
    with tempfile.TemporaryFile(dir=folder) as file:
        try:
            shutil.copyfileobj(member, file, CHUNK)
            file.flush()
        except OSError as error:
            raise UsageError(
                f"data {path}: its images cannot be unpacked into {folder}: {error.strerror}; {mend}"
            ) from None
        return os.dup(file.fileno())
