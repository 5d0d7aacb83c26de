"""Which ranges and which parts in int8: chosen by the error that they make of the logits."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import onnx

from optpipe.errors import RunError
from optpipe.precision import network as networks
from optpipe.precision import placement as placements
from optpipe.precision import ranges
from optpipe.precision.network import Network
from optpipe.precision.outcome import LayerError, PlacementTrial, RangeMethod, Settings
from optpipe.precision.placement import Placement
from optpipe.types import Images

if TYPE_CHECKING:
    from numpy.typing import NDArray

Note = Callable[[str], None]
STRUCTURE_IMAGES = 8
"""Images that give the ranges where only the structure of the graph counts."""


@dataclass(frozen=True, slots=True)
class Quantized:
    """A quantized graph and how it was chosen. Not JSON-able."""

    proto: onnx.ModelProto
    placement: Placement
    range_method: RangeMethod
    thresholds: Mapping[str, float]
    trials: tuple[PlacementTrial, ...] = ()


@dataclass(frozen=True, slots=True)
class Judge:
    """Measures a quantized graph on images that did not give its ranges. Not JSON-able."""

    images: Images
    indices: tuple[int, ...]
    reference: NDArray[np.float64]

    def error(self, proto: onnx.ModelProto) -> tuple[float, float]:
        """Noise-to-signal power of the logits against fp32, and the fraction of images of the same class.

        What is added to all logits of an image alike is no noise: it changes no probability.
        """
        found = networks.logits(proto, self.images, self.indices)
        signal = self.reference - self.reference.mean(axis=1, keepdims=True)
        noise = found - found.mean(axis=1, keepdims=True) - signal
        same = found.argmax(axis=1) == self.reference.argmax(axis=1)
        power = float((signal**2).sum())
        return float((noise**2).sum()) / power if power > 0 else 0.0, float(same.mean())


def quantize_structure(network: Network, images: Images, smallest_scale: float) -> Quantized:
    """Everything quantized, with min-max ranges of a few images: quick to make, not accurate."""
    _refuse_nothing_to_quantize(network)
    placement = Placement()
    indices = tuple(range(min(STRUCTURE_IMAGES, len(images))))
    peaks = networks.largest(network, placement.tensors(network), images, indices)
    return Quantized(placements.place(network, peaks, placement, smallest_scale), placement, "minmax", peaks)


def quantize(
    network: Network, images: Images, settings: Settings, smallest_scale: float, seed: int, note: Note
) -> tuple[Quantized, Judge]:
    """The quantized network with the least error by range method, and in float what it takes to be accurate.

    Raises:
        RunError: there is nothing to quantize, or the fp32 network computes what is not finite.
    """
    _refuse_nothing_to_quantize(network)
    ranging, judging = split(len(images), settings.max_images, seed)
    names = Placement().tensors(network)
    note(f"ranges from {len(ranging)} images")
    peaks = networks.largest(network, names, images, ranging)
    counts: Mapping[str, NDArray[np.int64]] = {}
    if set(settings.range_methods) != {"minmax"}:
        counts = ranges.histograms(network, peaks, images, ranging)
    judge = Judge(images, judging, networks.logits(network.proto, images, judging))
    search = _Search(network, judge, settings, smallest_scale, note)
    for method in dict.fromkeys(settings.range_methods):
        thresholds = ranges.thresholds(method, peaks, counts, settings.percentile)
        search.attempt(Placement(), method, thresholds)
    search.leave_parts_in_float()
    search.leave_layers_in_float()
    return search.result(), judge


def split(count: int, most: int, seed: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Indices that give ranges, and others that give errors: one in four; a single image gives both."""
    order = np.random.default_rng(seed).permutation(count)[:most].tolist()
    judging = max(1, len(order) // 4)
    return tuple(sorted(order[judging:] or order)), tuple(sorted(order[:judging]))


class _Search:
    """Keeps the best placement so far, and all that were tried."""

    def __init__(
        self, network: Network, judge: Judge, settings: Settings, smallest_scale: float, note: Note
    ) -> None:
        self._network = network
        self._judge = judge
        self._settings = settings
        self._smallest_scale = smallest_scale
        self._note = note
        self._trials: list[PlacementTrial] = []
        self._best: tuple[float, Quantized] | None = None

    def attempt(self, placement: Placement, method: RangeMethod, thresholds: Mapping[str, float]) -> float:
        """The error of a placement; it becomes the best where it is."""
        proto = placements.place(self._network, thresholds, placement, self._smallest_scale)
        error, agreement = self._judge.error(proto)
        in_float = placement.in_float(self._network)
        self._trials.append(PlacementTrial(method, in_float, error, agreement, len(self._judge.indices)))
        self._note(f"{method}, in float: {', '.join(in_float) or 'nothing'}: error {error:.2%}")
        if self._best is None or error < self._best[0]:
            self._best = error, Quantized(proto, placement, method, thresholds)
        return error

    def leave_parts_in_float(self) -> None:
        """First layer, last layer, residual additions: what cuts the error most first."""
        while self._too_large():
            before, best = self._current()
            candidates = list(_parts(self._network, best.placement))
            for candidate in candidates:
                self.attempt(candidate, best.range_method, best.thresholds)
            if not self._settle(before, best):
                return

    def leave_layers_in_float(self) -> None:
        """Single layers, those with the most noise of their own first."""
        if not self._too_large() or not self._settings.max_layers_in_float:
            return
        _, best = self._current()
        errors = layer_errors(self._network, best, self._judge.images, self._judge.indices)
        pairs = zip(self._network.layers, errors, strict=True)
        noise = {layer.node: _own_noise(error) for layer, error in pairs if error.quantized}
        order = sorted(noise, key=lambda node: -noise[node])
        for node in order[: self._settings.max_layers_in_float]:
            if not self._too_large():
                return
            before, best = self._current()
            float_layers = best.placement.float_layers | {node}
            self.attempt(
                replace(best.placement, float_layers=float_layers), best.range_method, best.thresholds
            )
            self._settle(before, best)

    def result(self) -> Quantized:
        """The best, with all trials and the chosen one marked."""
        _, best = self._current()
        in_float = best.placement.in_float(self._network)
        trials = tuple(
            replace(trial, chosen=(trial.range_method, trial.in_float) == (best.range_method, in_float))
            for trial in self._trials
        )
        return replace(best, trials=trials)

    def _current(self) -> tuple[float, Quantized]:
        assert self._best is not None
        return self._best

    def _too_large(self) -> bool:
        return self._current()[0] > self._settings.max_error

    def _settle(self, before: float, previous: Quantized) -> bool:
        """Whether the error was cut by enough to be worth its time; goes back to ``previous`` if not."""
        if self._current()[0] <= before * (1 - self._settings.min_cut) and self._current()[0] < before:
            return True
        self._best = before, previous
        return False


def layer_errors(
    network: Network, quantized: Quantized, images: Images, indices: Sequence[int]
) -> tuple[LayerError, ...]:
    """The error of each layer, in execution order; computed a batch of images at a time."""
    dequantized = placements.weights(quantized.proto, network.layers)
    scales = placements.scales(quantized.proto)
    inputs = tuple(dict.fromkeys(layer.input for layer in network.layers))
    outputs = tuple(dict.fromkeys(layer.output for layer in network.layers))
    names = tuple(dict.fromkeys(inputs + outputs))
    size = networks.batch_size(network, names + outputs)
    own, accumulated = _Powers(), _Powers()
    for exact, noisy in zip(
        networks.tensors(network.proto, names, images, indices, size),
        networks.tensors(quantized.proto, outputs, images, indices, size),
        strict=True,
    ):
        for name in inputs:
            if name in scales:
                own.add(name, exact[name], _fake_quantized(exact[name], scales[name]))
        for name in outputs:
            accumulated.add(name, exact[name], noisy[name])
    found = []
    for layer in network.layers:
        of_weight = _Powers()
        if layer.node in dequantized:
            of_weight.add(layer.weight, network.weight(layer.weight), dequantized[layer.node])
        found.append(
            LayerError(
                layer=layer.name,
                op=layer.op,
                weight_sqnr_db=of_weight.decibels(layer.weight),
                activation_sqnr_db=own.decibels(layer.input) if layer.node in dequantized else None,
                accumulated_sqnr_db=accumulated.decibels(layer.output),
                quantized=layer.node in dequantized,
            )
        )
    return tuple(found)


class _Powers:
    """Sums of signal and noise power by name."""

    def __init__(self) -> None:
        self._sums: dict[str, tuple[float, float]] = {}

    def add(self, name: str, exact: NDArray[np.float32], noisy: NDArray[np.float32]) -> None:
        signal, noise = self._sums.get(name, (0.0, 0.0))
        self._sums[name] = (
            signal + float(np.square(exact, dtype=np.float64).sum()),
            noise + float(np.square(noisy - exact, dtype=np.float64).sum()),
        )

    def decibels(self, name: str) -> float | None:
        """None where there is no signal or no noise."""
        signal, noise = self._sums.get(name, (0.0, 0.0))
        return 10 * math.log10(signal / noise) if signal > 0 and noise > 0 else None


def _fake_quantized(values: NDArray[np.float32], scale: float) -> NDArray[np.float32]:
    """What int8 with this scale makes of the values."""
    step = np.float32(scale)
    rounded: NDArray[np.float32] = np.clip(np.rint(values / step), -128, 127) * step
    return rounded


def _own_noise(error: LayerError) -> float:
    """The noise that a layer adds by itself, as a fraction of its output's power, to first order."""
    found = [d for d in (error.weight_sqnr_db, error.activation_sqnr_db) if d is not None]
    return sum(10 ** (-decibels / 10) for decibels in found)


def _parts(network: Network, placement: Placement) -> Iterable[Placement]:
    """The placements with one part more in float."""
    for layer in dict.fromkeys((network.layers[0], network.layers[-1])):
        if layer.node not in placement.float_layers:
            yield replace(placement, float_layers=placement.float_layers | {layer.node})
    if placement.residual and network.additions:
        yield replace(placement, residual=False)


def _refuse_nothing_to_quantize(network: Network) -> None:
    if not network.layers:
        raise RunError("int8: the network has no convolution or linear layer to quantize")
