"""The memory bank: what interim networks say about every training image, stored once (EKG, Eqs 10 and 11).

One file for each teacher, float16 (N, classes), read memory-mapped: a training step touches only the rows of
its own images. At the file's end, after the array, is the sha256 of all before it.
"""

from __future__ import annotations

import functools
import hashlib
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import nn

from optpipe import files, seals, tune
from optpipe.errors import RunError, UsageError
from optpipe.types import Emit, Event, Images

STORED = np.dtype(np.float16)
LARGEST = float(np.finfo(STORED).max)
# Rows read at once for a teacher's loss: of 1000 classes, 16 MB in float32.
ROWS = 4096

Stored = NDArray[np.float16]


@dataclass(frozen=True, slots=True, eq=False)
class MemoryBank:
    """The stored logits of each teacher, and its cross-entropy to the labels of all training images.

    A :class:`~optpipe.tune.Teachers`. The arrays (N, classes) are mapped files, for reading only.
    """

    logits: tuple[Stored, ...]
    losses: tuple[float, ...]

    def mean(self, which: Sequence[int], images: Sequence[int]) -> torch.Tensor:
        """The mean logits of those teachers on those images, float32 (B, classes) (EKG, Eq. 13)."""
        rows = np.asarray(images)
        total = torch.zeros(len(rows), self.logits[0].shape[1])
        for teacher in which:
            total += torch.from_numpy(self.logits[teacher][rows])
        return total / len(which)


def size_bytes(images: int, classes: int, teachers: int) -> int:
    """The bytes of a bank's logits: images times classes times teachers, 2 bytes each."""
    return images * classes * teachers * STORED.itemsize


def spaced(losses: Sequence[float], k: int) -> tuple[int, ...]:
    """The indices of up to ``k`` interim networks with evenly spaced losses (EKG, Eq. 11).

    ``losses`` are those of all networks on the way, the original's first and the chosen one's last; of
    the indices the one nearest to the chosen network comes first. Two of the ``k`` losses may be nearest to
    the same network, which then teaches once; of networks equally near the earlier one is taken.

    Raises:
        ValueError: there is no network, or ``k`` is below 1.
    """
    if not losses or k < 1:
        raise ValueError(f"{k} teachers of {len(losses)} networks: at least one of each is needed")
    first, last = losses[0], losses[-1]
    wanted = [(k - number) / k * last + number / k * first for number in range(1, k + 1)]
    nearest = [min(range(len(losses)), key=lambda i: abs(loss - losses[i])) for loss in wanted]
    return tuple(dict.fromkeys(nearest))


def build(
    folder: Path,
    networks: Sequence[Callable[[], nn.Module]],
    images: Images,
    *,
    classes: int,
    device: str = "cpu",
    half: bool = False,
    emit: Emit | None = None,
    resized: Callable[[int], Images] | None = None,
    peers: tune.Peers = tune.ALONE,
) -> MemoryBank:
    """A bank of the logits of ``networks`` on all ``images``, in ``folder`` (EKG, Eq. 10).

    The folder's name must say what the logits depend on: complete files that are there are taken as they
    are, so that a killed build goes on with the teacher that it was at. Each network is made when its turn
    comes and let go after it. Images are not augmented; batch-norm takes batch statistics, as in the
    search: interim networks were never trained, and their running statistics are the original's. ``half``
    computes in bfloat16. ``resized`` gives the images as the network of that index takes them, where networks
    take them in different sizes: the same images, in the same order. Of several ``peers`` each computes the
    rows of its own part of the images, the same ones as one process would; the first one joins the parts.

    Raises:
        UsageError: the images have no labels.
        RunError: the disk has no room for the bank (before anything is computed), or a logit is beyond
            float16.
    """
    if images.labels is None:
        raise UsageError(
            "a memory bank needs labelled calibration images: its teachers' losses are to labels"
        )
    shape = (len(images), classes)
    paths = [folder / f"teacher-{number}.npy" for number in range(len(networks))]
    missing = _missing(paths, shape, peers)
    _announce(folder, shape, len(paths), len(missing), emit, peers)
    for number, (path, network) in enumerate(zip(paths, networks, strict=True), start=1):
        if path in missing:
            own = images if resized is None else resized(number - 1)
            part = functools.partial(_write, network=network, images=own, device=device, half=half, emit=emit)
            _write_together(path, shape, part, peers)
        if emit is not None:
            emit(Event("progress", "memory bank", path.stem, number, len(paths)))
    return open_bank(folder, len(paths), images, classes=classes, peers=peers)


def open_bank(
    folder: Path, teachers: int, images: Images, *, classes: int, peers: tune.Peers = tune.ALONE
) -> MemoryBank:
    """The bank that :func:`build` left in a folder.

    Raises:
        UsageError: the images have no labels.
        RunError: a teacher's file is missing or of another shape.
    """
    if images.labels is None:
        raise UsageError(
            "a memory bank needs labelled calibration images: its teachers' losses are to labels"
        )
    logits: list[Stored] = []
    for number in range(teachers):
        path = folder / f"teacher-{number}.npy"
        found = _stored(path, (len(images), classes))
        if found is None:
            raise RunError(
                f"{path}: holds no logits of {len(images)} images in {classes} classes; build the bank again"
            )
        logits.append(found)
    return MemoryBank(tuple(logits), tuple(_loss(stored, images.labels, peers) for stored in logits))


def _missing(paths: Sequence[Path], shape: tuple[int, int], peers: tune.Peers) -> list[Path]:
    """The files that are not there, or not whole; each of the peers reads its own part of them."""
    lacks = torch.zeros(len(paths))
    for place in tune.own_part(range(len(paths)), peers):
        lacks[place] = float(_stored(paths[place], shape) is None)
    return [path for path, lack in zip(paths, peers.total(lacks).tolist(), strict=True) if lack]


def _announce(
    folder: Path, shape: tuple[int, int], teachers: int, missing: int, emit: Emit | None, peers: tune.Peers
) -> None:
    """Say how large the bank will be, and refuse one that does not fit on the disk."""
    whole, needed = size_bytes(*shape, teachers), size_bytes(*shape, missing)
    if missing and peers.size > 1:
        needed += size_bytes(*shape, 1)  # the parts of a teacher, until they are joined
    if emit is not None:
        product = f"{teachers} x {shape[0]} x {shape[1]}"
        text = f"teachers x images x classes: {product} in float16, {_readable(whole)}"
        there = f", {teachers - missing} of the teachers stored before" if missing < teachers else ""
        emit(Event("note", "memory bank", text + there, fields=(("bytes", whole),)))
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if missing and needed > free:
        raise RunError(
            f"{folder}: the memory bank needs {_readable(needed)} more, and the disk has {_readable(free)} "
            "free; free some space, or set a smaller [recover] bank"
        )


def _write_together(
    path: Path, shape: tuple[int, int], write: Callable[..., None], peers: tune.Peers
) -> None:
    """Store a network's logits, each of the peers its own part of them."""
    batches = tune.batches_of(shape[0], "batch")
    if peers.size == 1:
        write(path, shape=shape, batches=batches)
        return
    parts = [path.with_suffix(f".part-{rank}-of-{peers.size}.npy") for rank in range(peers.size)]
    own = tune.own_part(range(len(batches)), peers)
    rows = sum(len(batches[place]) for place in own)
    if rows and _stored(parts[peers.rank], (rows, shape[1])) is None:
        write(parts[peers.rank], shape=(rows, shape[1]), batches=[batches[place] for place in own])
    peers.total(torch.zeros(1))  # all have written theirs
    if peers.rank == 0:
        _join(path, shape, [part for part in parts if part.exists()])  # of few batches some have none
    peers.total(torch.zeros(1))  # the whole is there for all


def _join(path: Path, shape: tuple[int, int], parts: Sequence[Path]) -> None:
    """Make the parts' rows, one part after the other, the file of a teacher."""
    with files.replacing(path) as temporary, temporary.open("wb") as whole:
        file = _begun(whole, shape)
        for part in parts:
            rows = np.load(part, mmap_mode="r", allow_pickle=False)
            for start in range(0, len(rows), ROWS):
                file.write(rows[start : start + ROWS].tobytes())
        whole.write(file.sha256.digest())
    for part in parts:
        part.unlink()


def _write(
    path: Path,
    *,
    network: Callable[[], nn.Module],
    images: Images,
    shape: tuple[int, int],
    batches: Sequence[range],
    device: str,
    half: bool,
    emit: Emit | None,
) -> None:
    """Store a network's logits batch by batch; the file is the whole new one or none.

    Written in sequence, not through a map: a map on a full disk ends the process without a word.
    """
    with files.replacing(path) as temporary, temporary.open("wb") as whole:
        file = _begun(whole, shape)
        found = tune.logit_batches(network(), images, device, "batch", half=half, emit=emit, batches=batches)
        for rows in found:
            if rows.shape[1] != shape[1]:
                raise RunError(f"{path.stem}: has {rows.shape[1]} classes, the bank {shape[1]}")
            largest = float(rows.abs().max())
            # Not clamped: that would make the classes beyond the range equally likely. Also true of NaN.
            if not largest <= LARGEST:
                raise RunError(
                    f"{path.stem}: a logit of {largest:g} does not fit in float16 (up to {LARGEST:g}): this "
                    'interim network is no teacher; set [recover] teachers = "single" or "none"'
                )
            file.write(rows.numpy().astype(STORED).tobytes())
        whole.write(file.sha256.digest())


class _Digested:
    """A file that is written to, and the sha256 of what was written so far."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.sha256 = hashlib.sha256()

    def write(self, content: bytes) -> int:
        """As the file's own."""
        self.sha256.update(content)
        return self._file.write(content)


def _begun(whole: IO[bytes], shape: tuple[int, int]) -> _Digested:
    """The file with the header of an array of that shape."""
    file = _Digested(whole)
    header = {"descr": np.lib.format.dtype_to_descr(STORED), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)
    return file


def _stored(path: Path, shape: tuple[int, int]) -> Stored | None:
    """The file's array, mapped; None where there is none of that shape, or it is damaged."""
    try:
        if not seals.ends_with_digest(path):
            return None
        found = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    return found if found.shape == shape and found.dtype == STORED else None


def _loss(stored: Stored, labels: torch.Tensor, peers: tune.Peers) -> float:
    """The cross-entropy of all rows to their labels, the mean; each of the peers reads its part of them."""
    starts = range(0, len(stored), ROWS)
    sums = torch.zeros(len(starts), dtype=torch.float64)
    for place in tune.own_part(range(len(starts)), peers):
        start = starts[place]
        rows = torch.from_numpy(stored[start : start + ROWS].astype(np.float32))
        sums[place] = float(F.cross_entropy(rows, labels[start : start + ROWS], reduction="sum"))
    total = 0.0
    for one in peers.total(sums).tolist():  # in one order, however many there are to add them
        total += one
    return total / len(stored)


def _readable(count: int) -> str:
    size, unit = float(count), "bytes"
    for larger in ("kB", "MB", "GB"):
        if size >= 1000:
            size, unit = size / 1000, larger
    return f"{size:.1f} {unit}" if unit != "bytes" else f"{count} bytes"
