"""Sets of images that are too large for memory: read again, batch by batch, whenever they are asked for."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from optpipe.data.preparing import Labels, Pixels, Preprocess, resize
from optpipe.errors import UsageError

SHARE = 8
"""Into how many parts memory is cut; a set that fits in one of them is held.

A run has up to three sets, one or two of them at a second size too, and worker processes have their own; the
networks, what they compute and the engines take the rest.
"""

Head = Callable[[tuple[int, ...]], "hashlib._Hash"]

_LIMITS = (
    Path("/sys/fs/cgroup/memory.max"),
    Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
)


def most_held() -> int:
    """Bytes of the largest set of images that is held in memory.

    Reading one again costs the decoding of every image, each time that it is looked at: what fits is held.
    """
    return _memory() // SHARE


def _memory() -> int:
    """Bytes of memory that this process may have, as far as the system tells."""
    found = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for path in _LIMITS:
        try:
            found.append(int(path.read_text(encoding="utf-8")))
        except (OSError, ValueError):  # no such limit, or "max"
            continue
    return min(found)


@dataclass(frozen=True, slots=True, eq=False)
class Stream:
    """Images that are read when they are asked for, at the size of ``preprocess``.

    ``read`` gives an image (H, W, C) by its index in the source; the set has those at ``indices`` (N,), which
    are called ``names``. ``marks`` (N, 32) are the sha256 of their pixels (C, H, W) when the set was made.
    """

    read: Callable[[int], Pixels | None]
    indices: NDArray[np.int64]
    preprocess: Preprocess
    names: Sequence[str]
    marks: NDArray[np.uint8]

    def planes(self, places: Sequence[int]) -> Pixels:
        """Pixels (N, C, H, W) of the images at those places of the set.

        Raises:
            UsageError: an image is gone, or is another one than it was.
        """
        return np.stack([self._planes(place) for place in places])

    def _planes(self, place: int) -> Pixels:
        image = self.read(int(self.indices[place]))
        if image is None:
            raise gone(self.names[place])
        planes = planes_of(resize(image, self.preprocess))
        if mark(planes) != self.marks[place].tobytes():
            raise UsageError(
                f"data: {self.names[place]} is not what it was when it was first read; while a run is at "
                "work its images must stay as they are"
            )
        return planes


def planes_of(image: Pixels) -> Pixels:
    """An image (H, W, C) as (C, H, W)."""
    return np.ascontiguousarray(image.transpose(2, 0, 1))


def mark(planes: Pixels) -> bytes:
    """What tells an image (C, H, W) from every other: the sha256 of its pixels."""
    return hashlib.sha256(planes.data).digest()


def gone(name: str) -> UsageError:
    """What is said of an image that was there before."""
    return UsageError(f"data: {name} can no longer be read; the run needs it again")


class Taken:
    """Takes the images of a set one by one, and holds them where the set is small enough."""

    def __init__(self, count: int, image_shape: tuple[int, ...], head: Head) -> None:
        """For at most ``count`` images of that shape (C, H, W)."""
        self.image_shape = image_shape
        self._shape = (count, *image_shape)
        self._head = head
        self._taken = 0
        held = int(np.prod(self._shape)) <= most_held()
        self._held = np.empty(self._shape, np.uint8) if held else None
        self._marks = np.empty((0 if held else count, 32), np.uint8)
        self._whole = head(self._shape)

    def add(self, planes: Pixels) -> None:
        """The next image."""
        if self._held is not None:
            self._held[self._taken] = planes
        else:
            self._marks[self._taken] = np.frombuffer(mark(planes), np.uint8)
            self._whole.update(planes.data)
        self._taken += 1

    @property
    def pixels(self) -> Pixels | None:
        """The images (N, C, H, W), where they are held."""
        return None if self._held is None else self._held[: self._taken]

    def stream(
        self,
        read: Callable[[int], Pixels | None],
        indices: Sequence[int],
        preprocess: Preprocess,
        names: Sequence[str],
    ) -> Stream | None:
        """How to have those that were taken again; None where they are held."""
        if self._held is not None:
            return None
        return Stream(read, np.asarray(indices, np.int64), preprocess, names, self._marks[: self._taken])

    def digest(self, labels: Labels | None, stream: Stream | None) -> str:
        """sha256 over all that a set is, the same whether it is held or not."""
        if self._held is not None:
            whole = self._head((self._taken, *self.image_shape))
            whole.update(self._held[: self._taken].data)
        elif self._taken == self._shape[0]:
            whole = self._whole.copy()
        else:  # some could not be read, and how many there are comes first
            assert stream is not None
            whole = self._head((self._taken, *self.image_shape))
            for place in range(self._taken):
                whole.update(stream.planes([place]).data)
        if labels is not None:
            whole.update(labels.data)
        return whole.hexdigest()


def head(labelled: bool, mean: tuple[float, ...], std: tuple[float, ...]) -> Head:
    """How the digest of a set of some shape begins."""
    return lambda shape: hashlib.sha256(f"{shape} {labelled} {mean} {std}\n".encode())
