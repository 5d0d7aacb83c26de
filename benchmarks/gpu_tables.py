"""What ``benchmarks/gpu.py`` records, and its Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from benchmarks.roofline import Floor, Roof
from optpipe.report.schema import EnvironmentReport
from optpipe.types import DeviceState, Fingerprint, Latency, Precision

SCHEMA = 1
Kind = Literal["original", "single", "depth"]


@dataclass(frozen=True, slots=True)
class Row:
    """One network on one engine; ``failure`` says why there is no latency.

    ``dropped`` are the blocks taken out, ``alike`` those any one of which leaves an equal structure (one
    dropped block only). The latency's ratio is to ``reference``, whose median in the same runs is
    ``reference_ms``. ``max_rel`` is the largest difference of a logit from torch's as a fraction of its
    image's largest logit. ``export_s`` and ``build_s`` are None where an earlier row's files served.
    """

    network: str
    precision: Precision
    batch: int
    engine: str
    kind: Kind
    count: int
    dropped: tuple[str, ...]
    alike: tuple[str, ...]
    parameters: int
    macs: int
    at: str
    seconds: float
    failure: str = ""
    latency: Latency | None = None
    floor: Floor | None = None
    reference: str = ""
    reference_ms: float | None = None
    max_rel: float | None = None
    export_s: float | None = None
    build_s: float | None = None

    @property
    def case(self) -> tuple[str, Precision, int]:
        """The network with its precision and batch."""
        return self.network, self.precision, self.batch

    @property
    def key(self) -> tuple[str, ...]:
        """What a row answers: no two in a record have the same."""
        which = self.alike[0] if self.kind == "single" else str(self.count)
        return (*map(str, self.case), self.engine, self.kind, which)


@dataclass(frozen=True, slots=True)
class Visit:
    """One call of the command: when, for how long, how, and the device's clocks around it."""

    at: str
    scale: str
    minutes: float
    rows: int
    left_out: int
    before: DeviceState | None
    after: DeviceState | None


@dataclass(frozen=True, slots=True)
class Record:
    """All that was measured on one machine; ``absent`` holds precision, backend and what it lacks."""

    schema: int
    device: str
    machine: Fingerprint
    environment: EnvironmentReport
    visits: tuple[Visit, ...]
    absent: tuple[tuple[Precision, str, str], ...]
    roofs: tuple[Roof, ...]
    rows: tuple[Row, ...]


def markdown(record: Record) -> str:
    """The record as the tables that are read."""
    where = "GPU" if record.device == "cuda" else "CPU"
    trial = any(visit.scale == "smoke" for visit in record.visits)
    title = (
        f"# A trial of the command on a {where}: its figures mean nothing"
        if trial
        else f"# Engines on a {where}"
    )
    lines = [title, ""]
    lines += [*_head(record), "", *_roofs(record)]
    timed = [row for row in record.rows if row.latency is not None]
    lines += _originals([row for row in timed if row.kind == "original"])
    cases = list(dict.fromkeys(row.case for row in timed if row.kind != "original"))
    for case in sorted(cases):
        lines += _drops(case, [row for row in timed if row.case == case])
    return "\n".join([*lines, *_failures(record), *_remarks(timed)]) + "\n"


def _head(record: Record) -> list[str]:
    machine, found = record.machine, record.environment
    versions = {**dict(machine.versions), **found.versions, "python": found.python, "optpipe": found.optpipe}
    dates = sorted({visit.at[:10] for visit in record.visits})
    lines = [
        f"{' and '.join(dates)}, executed on {machine.device}, driver {machine.driver}, "
        f"{machine.clocks or 'clocks not readable'}; host {found.platform}; "
        + ", ".join(f"{name} {version}" for name, version in versions.items())
        + ". Written by `benchmarks/gpu.py`.",
        "",
        "Random weights and random images: only times are measured here, no accuracy. Batch-norm's statistics "
        "were set on random images, so that activations are of ordinary size. An engine is listed "
        "only if its logits are those of torch in fp32, within its precision's tolerance. Every row is timed in "
        "turn with another, the originals with torch eager, the others with the original on the same engine: "
        "ratios are of neighbouring runs, with their 95% interval, and the reference's tensors pass through the "
        "same cache between a network's runs.",
        "",
        "| run | scale | minutes | rows | left out for want of time | clocks before | clocks after |",
        "|---|---|---|---|---|---|---|",
    ]
    for visit in record.visits:
        lines.append(
            f"| {visit.at} | {visit.scale} | {visit.minutes:.1f} | {visit.rows} | {visit.left_out} | "
            f"{_state(visit.before)} | {_state(visit.after)} |"
        )
    return lines


def _state(state: DeviceState | None) -> str:
    if state is None:
        return "not readable"
    held = f", throttled: {', '.join(state.throttle)}" if state.throttle else ""
    return f"SM {state.sm_clock_mhz} MHz, memory {state.memory_clock_mhz} MHz, {state.temperature_c} °C{held}"


def _roofs(record: Record) -> list[str]:
    lines = [
        "## The device's own limits",
        "",
        "Measured through torch: a copy within the device's memory, and a product of square matrices of random "
        "numbers (TF32 off). Medians.",
        "",
        "| precision | memory, GB/s | bytes copied | arithmetic, TFLOP/s | matrix | runs |",
        "|---|---|---|---|---|---|",
    ]
    for roof in record.roofs:
        lines.append(
            f"| {roof.precision} | {roof.bytes_per_s / 1e9:.0f} | {roof.copied_bytes} | "
            f"{roof.flops_per_s / 1e12:.3g} | {roof.matrix} | {roof.samples} |"
        )
    return [*lines, ""]


def _originals(rows: Sequence[Row]) -> list[str]:
    if not rows:
        return []
    headline = rows[0].latency.headline if rows[0].latency else ""
    lines = [
        "## The original networks",
        "",
        f"Medians in ms; time is {headline}. Against eager: the ratio to torch eager at the same precision and "
        "batch, for torch eager itself that of two sessions. The floors are the least time that memory and "
        "arithmetic allow, and in brackets the part of the measured time that they make up: of the whole "
        "network, if weights and images come from memory, activations never leave the chip and an engine "
        "multiplies as often as the network says; of its layers one by one, if every layer reads and writes "
        "memory, which an engine can beat whose activations fit into the cache.",
        "",
        "| network | precision | batch | engine | time | p95 | against eager | runs | enqueue | to device | "
        "to host | floor, whole | floor, layers | build s | notes |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in sorted(rows, key=lambda row: (row.case, _time_ms(row))):
        assert row.latency is not None
        latency = row.latency
        notes = [*latency.notes, *(["see warnings"] if latency.warnings else [])]
        lines.append(
            f"| {row.network} | {row.precision} | {row.batch} | {row.engine} | {latency.median_ms:.4f} | "
            f"{latency.p95_ms:.4f} | {_ratio(latency)} | {latency.samples} | {_ms(latency.enqueue_ms)} | "
            f"{_ms(latency.h2d_ms)} | {_ms(latency.d2h_ms)} | "
            f"{_floor(row, row.floor.whole_ms if row.floor else None)} | "
            f"{_floor(row, row.floor.layers_ms if row.floor else None)} | "
            f"{'' if row.build_s is None else f'{row.build_s:.1f}'} | {'; '.join(notes)} |"
        )
    return [*lines, ""]


def _drops(case: tuple[str, Precision, int], rows: Sequence[Row]) -> list[str]:
    network, precision, batch = case
    # Every engine's row knows them; a failed original's is not among these.
    macs = {row.kind: row.macs for row in rows}.get("original")
    lines = [f"## {network}, {precision}, batch {batch}", ""]
    engines = list(dict.fromkeys(row.engine for row in rows if row.kind != "original"))
    singles = [row for row in rows if row.kind == "single"]
    if singles:
        lines += [
            "τ, what dropping the block saves of the original's time on the same engine, with its 95% interval "
            "and the runs of each. Blocks in one line leave equal structures, of which one was timed.",
            "",
            f"| any one of | MACs | {' | '.join(engines)} |",
            f"|---|---|{'---|' * len(engines)}",
        ]
        for alike in dict.fromkeys(row.alike for row in singles):
            mine = {row.engine: row for row in singles if row.alike == alike}
            saved = _percent(next(iter(mine.values())).macs, macs)
            cells = [_saving(mine[engine].latency) if engine in mine else "" for engine in engines]
            lines.append(f"| {', '.join(alike)} | {saved} | {' | '.join(cells)} |")
        lines.append("")
    depths = [row for row in rows if row.kind == "depth"]
    if depths:
        best = [row for row in (_largest(singles, engine) for engine in engines) if row is not None]
        lines += [
            "Several blocks dropped, those of the largest τ on the engine itself; the first is the best of the table "
            "above.",
            "",
            "| engine | blocks | MACs | saved time (95% interval; runs) | time, ms | original's, ms | build s | dropped |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for row in sorted([*best, *depths], key=lambda row: (engines.index(row.engine), row.count)):
            build = "" if row.build_s is None else f"{row.build_s:.1f}"
            lines.append(
                f"| {row.engine} | {row.count} | {_percent(row.macs, macs)} | {_saving(row.latency)} | "
                f"{_time_ms(row):.4f} | {_ms(row.reference_ms)} | {build} | {', '.join(row.dropped)} |"
            )
        lines.append("")
    return lines


def _largest(singles: Sequence[Row], engine: str) -> Row | None:
    mine = [row for row in singles if row.engine == engine]
    return min(mine, key=tau_order) if mine else None


def tau_order(row: Row) -> float:
    """Sorts rows by τ, the largest first."""
    assert row.latency is not None and row.latency.ratio_to_original is not None
    return row.latency.ratio_to_original


def _failures(record: Record) -> list[str]:
    failed = [row for row in record.rows if row.failure]
    if not failed and not record.absent:
        return []
    lines = ["## What did not run", ""]
    for row in failed:
        what = "the original" if row.kind == "original" else f"without {', '.join(row.dropped)}"
        lines.append(
            f"- {row.engine}, {row.network}, {row.precision}, batch {row.batch}, {what}: {row.failure}"
        )
    lines += [f"- {backend}, {precision}: {why}" for precision, backend, why in record.absent]
    return [*lines, ""]


def _remarks(rows: Sequence[Row]) -> list[str]:
    """Each row's warnings, and how many rows the time was too short for."""
    lines, short = [], 0
    for row in rows:
        assert row.latency is not None
        short += not row.latency.converged
        what = "original" if row.kind == "original" else f"without {', '.join(row.dropped)}"
        where = f"{row.engine}, {row.network}, {row.precision}, batch {row.batch}, {what}"
        lines += [f"- {where}: {warning}" for warning in row.latency.warnings]
    if short:
        lines.append(
            f"- {short} of {len(rows)} rows: the time was used up before the interval was within the clock's "
            "tolerance; the interval says how wide it is"
        )
    return ["## Warnings", "", *lines] if lines else []


def _time_ms(row: Row) -> float:
    assert row.latency is not None
    return row.latency.median_ms


def _ratio(latency: Latency) -> str:
    if latency.ratio_to_original is None or latency.ratio_ci95 is None:
        return ""
    low, high = latency.ratio_ci95
    return f"{latency.ratio_to_original:.3f} ({low:.3f} to {high:.3f})"


def _saving(latency: Latency | None) -> str:
    if latency is None or latency.ratio_to_original is None or latency.ratio_ci95 is None:
        return ""
    low, high = latency.ratio_ci95
    saved = 1 - latency.ratio_to_original
    return f"{saved:.2%} ({1 - high:.2%} to {1 - low:.2%}; {latency.samples})"


def _floor(row: Row, floor_ms: float | None) -> str:
    return "" if floor_ms is None else f"{floor_ms:.4f} ({floor_ms / _time_ms(row):.0%})"


def _percent(part: int, whole: int | None) -> str:
    return "" if not whole else f"-{1 - part / whole:.1%}"


def _ms(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
