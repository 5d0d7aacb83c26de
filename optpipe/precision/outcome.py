"""What a conversion is asked for and what it gives: plain values, light to import."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from optpipe.errors import UsageError
from optpipe.types import Precision, Table

RangeMethod = Literal["minmax", "percentile", "entropy"]
Rest = Literal["fp32", "fp16"]

RESIDUAL = "residual additions"
"""How the part of a network that all its residual additions make up is named in tables."""


@dataclass(frozen=True, slots=True)
class Settings:
    """How fp16 and int8 files are made; the keys of a recipe's table and their defaults.

    ``range_methods`` are tried in turn, and the one with the least error is taken; ``percentile`` (of the
    absolute values) belongs to the method of that name. ``max_images`` bounds the calibration images that
    are used: three quarters give the ranges, the rest the errors. While an int8 network's error is above
    ``max_error``, parts of it are left in float: what cuts the error most first, never what cuts it by a
    smaller share than ``min_cut``, and single layers only up to ``max_layers_in_float``. The error is the
    noise of the logits as a fraction of their power. An op is kept in fp32 where its values, times
    ``fp16_margin``, do not fit into fp16.
    """

    range_methods: tuple[RangeMethod, ...] = ("minmax", "percentile", "entropy")
    percentile: float = 99.999
    max_images: int = 256
    max_error: float = 0.005
    min_cut: float = 0.1
    max_layers_in_float: int = 3
    fp16_margin: float = 2.0


def check(settings: Settings, where: str = "[precision]") -> None:
    """UsageError for settings that cannot be used; ``where`` says where they stand."""
    checks: tuple[tuple[str, object, bool, str], ...] = (
        (
            "range_methods",
            list(settings.range_methods),
            bool(settings.range_methods),
            "must name at least one",
        ),
        ("percentile", settings.percentile, 50 < settings.percentile <= 100, "must be above 50, at most 100"),
        ("max_images", settings.max_images, settings.max_images >= 1, "must be at least 1"),
        ("max_error", settings.max_error, 0 <= settings.max_error < 1, "must be at least 0 and below 1"),
        ("min_cut", settings.min_cut, 0 <= settings.min_cut < 1, "must be at least 0 and below 1"),
        (
            "max_layers_in_float",
            settings.max_layers_in_float,
            settings.max_layers_in_float >= 0,
            "must be 0 or more",
        ),
        ("fp16_margin", settings.fp16_margin, 1 <= settings.fp16_margin <= 65504, "must be 1 to 65504"),
    )
    for key, value, fine, message in checks:
        if not fine:
            raise UsageError(f"{where} {key} = {value}: {message}")


@dataclass(frozen=True, slots=True)
class PlacementTrial:
    """One way to quantize a network, and its error on images that did not give the ranges.

    ``error`` is the noise-to-signal power ratio of the logits against fp32, ``agreement`` the fraction of
    images of the same class; ``in_float`` are the parts that were not quantized.
    """

    range_method: RangeMethod
    in_float: tuple[str, ...]
    error: float
    agreement: float
    images: int
    chosen: bool = False


@dataclass(frozen=True, slots=True)
class LayerError:
    """Signal-to-quantization-noise ratios of a layer in dB, None where there is no noise to measure.

    ``weight_sqnr_db`` and ``activation_sqnr_db`` are the layer's own: of its weight, and of its input as
    fp32 has it. ``accumulated_sqnr_db`` is of its output in the quantized network against fp32's: what all
    layers up to this one have added up to.
    """

    layer: str
    op: str
    weight_sqnr_db: float | None
    activation_sqnr_db: float | None
    accumulated_sqnr_db: float | None
    quantized: bool


@dataclass(frozen=True, slots=True)
class Converted:
    """An ONNX file at a precision, and how it was made. JSON-able but for its path.

    ``kept_in_float`` names what int8 left unquantized, or what fp16 left in fp32. ``error`` is that of the
    file as written, as in :class:`PlacementTrial`; None where it was not measured. ``layers`` are in
    execution order.
    """

    path: Path
    precision: Precision
    kept_in_float: tuple[str, ...] = ()
    range_method: RangeMethod | None = None
    error: float | None = None
    trials: tuple[PlacementTrial, ...] = ()
    layers: tuple[LayerError, ...] = ()


def tables(converted: Converted) -> tuple[Table, ...]:
    """What a report shows of a conversion: the ways to quantize that were tried, and each layer's error."""
    found = []
    if converted.trials:
        found.append(
            Table(
                f"{converted.precision}: what was tried",
                ("ranges", "left in float", "error of the logits", "top-1 agreement", "images", "chosen"),
                tuple(
                    (t.range_method, ", ".join(t.in_float), t.error, t.agreement, t.images, t.chosen)
                    for t in converted.trials
                ),
            )
        )
    if converted.layers:
        found.append(
            Table(
                f"{converted.precision}: error of each layer (signal to quantization noise, dB)",
                ("layer", "op", "quantized", "weight", "input", "output, accumulated"),
                tuple(
                    (
                        e.layer,
                        e.op,
                        e.quantized,
                        _rounded(e.weight_sqnr_db),
                        _rounded(e.activation_sqnr_db),
                        _rounded(e.accumulated_sqnr_db),
                    )
                    for e in converted.layers
                ),
            )
        )
    return tuple(found)


def _rounded(decibels: float | None) -> float | None:
    return None if decibels is None else round(decibels, 1)
