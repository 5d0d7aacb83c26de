"""What accuracy costs which latency: every network that was measured, as figures and tables. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from optpipe.report.html_parts import Entry, Sheet
from optpipe.report.schema import Report
from optpipe.types import Curve, Figure, Latency, Quality

TITLE = "Accuracy over latency"
SIZE_TITLE = "What MACs predict, and what was measured"


@dataclass(frozen=True, slots=True)
class Network:
    """One measured network; ``left`` is its latency as a share of the original's, ``low`` to ``high`` its
    95% interval, ``macs`` the share of MACs left, None where they are not known.

    ``look`` names the networks that are drawn alike.
    """

    name: str
    look: str
    left: float
    low: float
    high: float
    median_ms: float
    macs: float | None
    quality: Quality | None
    chosen: bool = False


def networks(report: Report) -> tuple[Network, ...]:
    """The original, the result at each precision, the ensemble, and the search's candidates."""
    return (*_shipped(report), *_candidates(report))


def front(found: Sequence[Network]) -> tuple[Network, ...]:
    """The networks, fastest first, that none of the others beats in latency and accuracy at once."""
    best: list[Network] = []
    known = [one for one in found if one.quality is not None]
    for one in sorted(known, key=lambda one: (one.left, -_accuracy(one))):
        if not best or _accuracy(one) > _accuracy(best[-1]):
            best.append(one)
    return tuple(best)


def figure(report: Report) -> Figure:
    """Accuracy over latency in percent of the original's: networks, their intervals, fronts, the budget.

    A front joins what was measured on the same images. Candidates whose accuracy nobody measured are strokes
    at the lower edge.
    """
    found = networks(report)
    placed = [one for one in found if one.quality is not None]
    dots = [
        Curve(look, tuple(one.left * 100 for one in mine), tuple(map(_accuracy, mine)), "dots")
        for look, mine in _by_look(placed)
    ]
    # Intervals of the few that are shipped can be told apart; those of all candidates could not.
    bars = [curve for one in _shipped(report) for curve in _intervals(one)]
    heights = [y for curve in (*bars, *dots) for y in curve.y]
    low, high = min(heights), max(heights)
    guides = list(_fronts(placed))
    allowed = report.budget.asked.allowed_ratio(report.original.latency)
    if allowed is not None:
        guides.append(_line("budget", [(allowed * 100, low), (allowed * 100, high)]))
    floor = low - 0.06 * max(high - low, 0.1)
    unscored = tuple(one.left * 100 for one in found if one.quality is None)
    timed = [Curve("candidate, only timed", unscored, (floor,) * len(unscored), "ticks")] if unscored else []
    # The order decides colours, markers and dashes: those that differ most for what matters most.
    curves = (*dots[:2], *guides, *bars, *dots[2:], *timed)
    metric = report.original.quality.metric
    return Figure(TITLE, "latency, % of the original's", f"{metric}, %", curves)


def size_figure(report: Report) -> Figure | None:
    """Measured latency over that predicted by MACs; None where the result alone could be drawn."""
    if not report.candidates:
        return None
    sized = [(one.look, one.macs * 100, one.left * 100) for one in networks(report) if one.macs is not None]
    curves = [
        Curve(
            look,
            tuple(x for at, x, _ in sized if at == look),
            tuple(y for at, _, y in sized if at == look),
            "dots",
        )
        for look in dict.fromkeys(look for look, _, _ in sized)
    ]
    least = min(min(x, y) for _, x, y in sized)
    curves.append(_line("as MACs predict", [(least, least), (100.0, 100.0)]))
    return Figure(SIZE_TITLE, "MACs, % of the original's", "latency, % of the original's", tuple(curves))


def sheet(report: Report) -> Sheet:
    """A row for each measured network, with what the figure shows of it and its intervals."""
    found = networks(report)
    ahead = {
        id(one)
        for split in {one.quality.split for one in found if one.quality is not None}
        for one in front(_on(found, split))
    }
    metric = report.original.quality.metric
    columns = (
        "network",
        "median ms",
        "latency left",
        "95% interval",
        metric,
        "95% interval",
        "images",
        "MACs left",
        "on the front",
        "chosen",
    )
    rows = tuple(_row(one, id(one) in ahead) for one in found)
    return Sheet("Every network that was measured", columns, rows)


def size_sheet(report: Report) -> Sheet:
    """Latency as MACs predict it and as it was measured, a row for each network of another size."""
    columns = ("network", "MACs left", "latency left", "95% interval", "slower than predicted by")
    rows = tuple(
        (
            Entry(one.name),
            _share(one.macs),
            _share(one.left),
            _interval(one.low, one.high),
            Entry(f"{(one.left - one.macs) * 100:+.1f} points", one.left - one.macs),
        )
        for one in networks(report)
        if one.macs is not None and one.look != "original"
    )
    return Sheet(f"{SIZE_TITLE}: each network", columns, rows)


def bars(
    point: tuple[float, float], across: tuple[float, float], upright: tuple[float, float]
) -> list[Curve]:
    """The 95% intervals of a point, ``across`` that of x and ``upright`` that of y, if they have a width."""
    x, y = point
    lines = [[(x, upright[0]), (x, upright[1])], [(across[0], y), (across[1], y)]]
    drawn = [_line("95% interval", line) for line in lines if line[0] != line[1]]
    return [replace(curve, style="interval") for curve in drawn]


def _shipped(report: Report) -> Iterator[Network]:
    original, result = report.original, report.result
    yield Network(
        "original", "original", 1.0, 1.0, 1.0, original.latency.median_ms, 1.0, original.quality, False
    )
    macs = result.macs / original.macs if original.macs else None
    measured: list[tuple[str, Latency | None, Quality | None]] = [
        (one.precision, one.latency, one.quality) for one in report.precisions
    ]
    if not measured:
        measured = [(report.target.precision, result.latency, result.quality)]
    for precision, latency, quality in measured:
        if latency is None or latency.ratio_to_original is None or latency.ratio_ci95 is None:
            continue
        chosen = precision == report.target.precision
        name = f"result, {precision}{' (chosen)' if chosen else ''}"
        # What fewer MACs save is to be seen at the precision of the original alone.
        size = macs if chosen else None
        ratio, ci95 = latency.ratio_to_original, latency.ratio_ci95
        yield Network(name, name, ratio, *ci95, latency.median_ms, size, quality, chosen)
    joined = report.ensemble
    if joined is not None and joined.latency is not None:
        left, interval = joined.latency.ratio_to_original, joined.latency.ratio_ci95
        if left is not None and interval is not None:
            name = f"ensemble of {joined.members}"
            yield Network(name, name, left, *interval, joined.latency.median_ms, None, joined.quality)


def _candidates(report: Report) -> Iterator[Network]:
    for one in report.candidates:
        look = "candidate"
        if one.chosen:
            look = "chosen, before recovery"
        if one.quality is not None:
            look += f" ({one.quality.split} images)"
        macs = one.macs / report.original.macs if report.original.macs else None
        yield Network(
            one.name, look, one.ratio, *one.ratio_ci95, one.median_ms, macs, one.quality, one.chosen
        )


def _by_look(found: Sequence[Network]) -> list[tuple[str, list[Network]]]:
    looks = dict.fromkeys(one.look for one in found)
    return [(look, [one for one in found if one.look == look]) for look in looks]


def _on(found: Sequence[Network], split: str) -> list[Network]:
    return [one for one in found if one.quality is not None and one.quality.split == split]


def _fronts(placed: Sequence[Network]) -> Iterator[Curve]:
    splits = list(dict.fromkeys(one.quality.split for one in placed if one.quality is not None))
    for split in splits:
        ahead = front(_on(placed, split))
        if len(ahead) > 1:
            name = "Pareto front" if len(splits) == 1 else f"Pareto front, {split} images"
            yield _line(name, [(one.left * 100, _accuracy(one)) for one in ahead])


def _intervals(one: Network) -> list[Curve]:
    if one.quality is None:
        return []
    low, high = one.quality.ci95
    ends = (one.low * 100, one.high * 100), (low * 100, high * 100)
    return bars((one.left * 100, _accuracy(one)), *ends)


def _line(name: str, found: Sequence[tuple[float, float]]) -> Curve:
    return Curve(name, tuple(x for x, _ in found), tuple(y for _, y in found))


def _accuracy(one: Network) -> float:
    assert one.quality is not None
    return one.quality.value * 100


def _row(one: Network, ahead: bool) -> tuple[Entry, ...]:
    quality = one.quality
    return (
        Entry(one.name),
        Entry(f"{one.median_ms:.3f}", one.median_ms),
        _share(one.left),
        Entry() if one.look == "original" else _interval(one.low, one.high),
        Entry() if quality is None else Entry(f"{quality.value:.2%}", quality.value),
        Entry() if quality is None else _interval(*quality.ci95),
        Entry() if quality is None else Entry(f"{quality.count} {quality.split}"),
        _share(one.macs),
        Entry("yes" if ahead else ""),
        Entry("yes" if one.chosen else ""),
    )


def _share(value: float | None) -> Entry:
    return Entry() if value is None else Entry(f"{value:.1%}", value)


def _interval(low: float, high: float) -> Entry:
    return Entry(f"{low:.1%} to {high:.1%}", low)
