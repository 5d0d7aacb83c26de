"""The range of each activation that int8 should span: from its absolute values over calibration images.

``onnxruntime.quantization`` brings calibrators, but they keep every activation of every image in memory,
write a graph to the disk, and their entropy method has as many bins as levels and so finds nothing. What
they are replaced by streams, and needs two passes over the images.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from optpipe.precision import network as networks
from optpipe.precision.network import Network
from optpipe.precision.outcome import RangeMethod
from optpipe.types import Images

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Histogram = NDArray[np.int64]

BINS = 2048
LEVELS = 128
"""Absolute values that int8 with zero point 0 can tell apart."""

_STEP = 16


def histograms(
    network: Network, peaks: Mapping[str, float], images: Images, indices: Sequence[int]
) -> dict[str, Histogram]:
    """How often each activation's absolute values fall into :data:`BINS` equal bins from 0 to its peak."""
    found = {name: np.zeros(BINS, np.int64) for name in peaks}
    size = networks.batch_size(network, tuple(peaks))
    for values in networks.tensors(network.proto, tuple(peaks), images, indices, size):
        for name, tensor in values.items():
            if peaks[name] > 0:
                bins = np.abs(tensor.ravel()) * np.float32(BINS / peaks[name])
                found[name] += np.bincount(np.minimum(bins.astype(np.int32), BINS - 1), minlength=BINS)
    return found


def thresholds(
    method: RangeMethod, peaks: Mapping[str, float], counts: Mapping[str, Histogram], percentile: float
) -> dict[str, float]:
    """The largest absolute value that int8 shall represent, for each activation."""
    if method == "minmax":
        return dict(peaks)
    if method == "percentile":
        return {name: peaks[name] * _percentile_share(counts[name], percentile) for name in peaks}
    return {name: peaks[name] * _entropy_share(counts[name]) for name in peaks}


def _percentile_share(counts: Histogram, percentile: float) -> float:
    """The share of the peak below which ``percentile`` percent of the values lie."""
    if not counts.any():
        return 1.0
    below = np.cumsum(counts) / counts.sum()
    return float(np.searchsorted(below, percentile / 100) + 1) / BINS if percentile < 100 else 1.0


def _entropy_share(counts: Histogram) -> float:
    """The share of the peak at which clipping and rounding together lose the least information.

    The least Kullback-Leibler divergence of the values from their quantized selves (Migacz, 8-bit inference
    with TensorRT, GTC 2017). Exact zeros, which rectified activations are full of and every range
    represents, are left out with the lowest bin.
    """
    counts = counts.copy()
    counts[0] = 0
    if not counts.any():
        return 1.0
    ends = range(LEVELS, BINS + 1, _STEP)
    divergences = [_divergence(counts, end) for end in ends]
    return ends[int(np.argmin(divergences))] / BINS


def _divergence(counts: Histogram, end: int) -> float:
    """Of the values clipped to the first ``end`` bins from the same in :data:`LEVELS` levels."""
    inside = counts[:end].astype(np.float64)
    occupied = inside > 0
    levels = np.arange(end) * LEVELS // end
    sums = np.bincount(levels, inside, LEVELS)
    spread = np.bincount(levels, occupied, LEVELS)
    quantized = np.where(occupied, sums[levels] / np.maximum(spread[levels], 1), 0.0)
    clipped = inside
    clipped[-1] += counts[end:].sum()
    if not quantized.any():
        return np.inf
    clipped, quantized = clipped / clipped.sum(), quantized / quantized.sum()
    # What is clipped into a bin that is empty otherwise has no quantized counterpart.
    floor = 1e-10
    seen = clipped > 0
    return float((clipped[seen] * np.log(clipped[seen] / np.maximum(quantized[seen], floor))).sum())
