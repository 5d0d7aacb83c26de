"""What the search shows in the report, as figures."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, fx

from optpipe.methods.dllp.training import Frame
from optpipe.types import Curve, Figure

BINS = 41


def all_of(
    frame: Frame, probabilities: Sequence[Tensor], kept: Sequence[Tensor], settled: fx.GraphModule
) -> tuple[Figure, ...]:
    """theta of all units, and the weights of some layers: original, pruned by magnitude, pruned here."""
    posterior = frame.config.score == "posterior"
    found = [_thetas(probabilities)] if posterior else []
    magnitudes = frame.masks.magnitudes(frame.model)
    counts = [int(mask.sum()) for mask in kept]
    by_size = frame.masks.highest(magnitudes, counts)
    named = {f"pruned by {'dllp' if posterior else 'magnitude'}": (settled, kept)}
    if posterior:
        named["pruned by magnitude"] = (frame.model, by_size)
    before = frame.masks.unit_weights(frame.model)
    after = {name: frame.masks.unit_weights(network) for name, (network, _) in named.items()}
    for index in _some(len(frame.masks.names), frame.config.histograms):
        curves = [("original", before[index].flatten())]
        for name, (_, mask) in named.items():
            curves.append((name, after[name][index][mask[index]].flatten()))
        found.append(_weights(frame.masks.names[index], curves))
    return tuple(found)


def _thetas(probabilities: Sequence[Tensor]) -> Figure:
    """How many units have which theta."""
    values = torch.cat([one.flatten() for one in probabilities]).numpy()
    counts, edges = np.histogram(values, bins=BINS, range=(0.0, 1.0))
    return Figure("Theta of all units", "theta", "units", (_curve("theta", counts, edges),))


def _weights(name: str, curves: Sequence[tuple[str, Tensor]]) -> Figure:
    """The densities of a layer's weights, as Fig. 1 has them."""
    reach = max(float(values.abs().max()) for _, values in curves if values.numel())
    drawn = []
    for label, values in curves:
        if values.numel():
            counts, edges = np.histogram(
                values.detach().cpu().numpy(), BINS, range=(-reach, reach), density=True
            )
            drawn.append(_curve(label, counts, edges))
    return Figure(f"Weights of {name}", "weight", "density", tuple(drawn))


def _curve(name: str, counts: np.ndarray, edges: np.ndarray) -> Curve:
    middles = (edges[:-1] + edges[1:]) / 2
    return Curve(name, tuple(map(float, middles)), tuple(map(float, counts)))


def _some(count: int, wanted: int) -> list[int]:
    """So many layers, evenly spaced from the first to the last."""
    if wanted == 0 or wanted >= count:
        return list(range(count))
    return sorted({round(index) for index in np.linspace(0, count - 1, wanted)})
