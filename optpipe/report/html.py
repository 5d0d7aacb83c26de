"""report.json -> one HTML file that asks for nothing, for people to look at and to print. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import quote

from optpipe.report import html_tables, html_tradeoff, layers, leakage, reliability
from optpipe.report.html_parts import Entry, Sheet, figure, prose, sheet, spread, table, text, words
from optpipe.report.html_style import SCRIPT, STYLE
from optpipe.report.schema import Report
from optpipe.types import Budget, DeviceState, Figure, Tune

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"
"""Nothing may be asked for, whatever a report holds."""


@dataclass(frozen=True, slots=True)
class Part:
    """A section of the page: its heading, and its content as HTML."""

    title: str
    content: str


class Pictures:
    """Draws the figures of one page, each under a number of its own."""

    def __init__(self) -> None:
        self._drawn = 0

    def draw(self, drawn: Figure, notes: Sequence[str] = (), numbers: Sheet | None = None) -> str:
        """The figure as HTML."""
        self._drawn += 1
        return figure(drawn, self._drawn, notes=notes, numbers=numbers)


def render(report: Report) -> str:
    """The whole report as one HTML page, made from the report alone."""
    pictures = Pictures()
    first = _first_screen(report, pictures)
    parts = [part for part in _parts(report, pictures) if part.content]
    numbered = list(enumerate(parts, start=1))
    links = "".join(f'<li><a href="#part{number}">{text(part.title)}</a></li>' for number, part in numbered)
    body = "\n".join(
        f'<section id="part{number}" aria-labelledby="title{number}">\n'
        f'<h2 id="title{number}">{text(part.title)}</h2>\n{part.content}\n</section>'
        for number, part in numbered
    )
    title = text(f"{report.name}: {report.method} on {report.model}")
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n{first}\n"
        f'<nav aria-labelledby="contents"><h2 id="contents">In this report</h2><ul>{links}</ul></nav>\n'
        f"{body}\n</main>\n<script>{SCRIPT}</script>\n</body>\n</html>\n"
    )


# What is read first


def _first_screen(report: Report, pictures: Pictures) -> str:
    notes = "".join(f"<p>Note: {text(note)}.</p>" for note in report.notes)
    warnings = "".join(
        f'<p class="warning"><strong>Warning:</strong> {text(one)}.</p>' for one in report.warnings
    )
    mark, look = ("Budget met", "met") if report.budget.met else ("Budget NOT met", "missed")
    target = report.target
    return (
        f"<header><h1>{text(report.name)}: {text(report.method)} on {text(report.model)}</h1>\n"
        f'<p class="soft">{text(target.backend)}, {text(target.precision)}, batch {target.batch}, on '
        f"{text(report.environment.executed_on)}</p>\n"
        f'<p class="verdict {look}"><strong>{mark}:</strong> {text(report.budget.verdict)}</p></header>\n'
        f"{warnings}{notes}\n"
        '<div class="top">\n<section aria-labelledby="came">'
        f'<h2 id="came">What was asked, and what came out</h2>\n{_asked(report)}\n{_cards(report)}\n'
        f"{table(html_tables.sides(report))}</section>\n"
        '<section aria-labelledby="tradeoff"><h2 id="tradeoff">The trade-off</h2>\n'
        f"{pictures.draw(html_tradeoff.figure(report), numbers=html_tradeoff.sheet(report))}\n"
        "</section></div>"
    )


def _asked(report: Report) -> str:
    return (
        f"<p><strong>Asked:</strong> {text(in_words(report.budget.asked))}.<br>"
        f"<strong>Why this plan:</strong> {text(report.reason)}.</p>"
    )


def in_words(asked: Budget) -> str:
    """What a budget asks for."""
    if asked.latency_ms is not None:
        return f"a latency of at most {asked.latency_ms:g} ms"
    if asked.drop_blocks is not None:
        return f"{asked.drop_blocks} blocks dropped"
    shares = (
        (asked.latency_reduction, "a latency {} below the original's"),
        (asked.macs_reduction, "{} fewer MACs"),
        (asked.parameters_reduction, "{} fewer parameters"),
        (asked.sparsity, "{} of the weights zero"),
    )
    return "".join(words.format(f"{share:.1%}") for share, words in shares if share is not None)


def _cards(report: Report) -> str:
    original, result = report.original, report.result
    points = (result.quality.value - original.quality.value) * 100
    ratio, ci95 = result.latency.ratio_to_original, result.latency.ratio_ci95
    shown = html_tables.accuracy(result.quality)
    cards: list[tuple[str, str, str]] = [(result.quality.metric, f"{points:+.2f} points", shown)]
    if ratio is not None and ci95 is not None:
        between = spread(f"{ci95[0] - 1:+.1%}", f"{ci95[1] - 1:+.1%}")
        cards.insert(0, ("latency", f"{ratio - 1:+.1%}", between))
    if original.macs:
        cards.append(("MACs", f"{result.macs / original.macs - 1:+.1%}", f"{result.macs:,}"))
    if original.parameters:
        changed = f"{result.parameters / original.parameters - 1:+.1%}"
        cards.append(("parameters", changed, f"{result.parameters:,}"))
    boxes = "".join(
        f"<div><dt>{text(name)}</dt><dd>{text(value)}<small>{words(note)}</small></dd></div>"
        for name, value, note in cards
    )
    return f'<dl class="figures">{boxes}</dl>'


# What is read below


def _parts(report: Report, pictures: Pictures) -> list[Part]:
    return [
        Part("The plan", _table(html_tables.taken_out(report))),
        Part("Precisions", _table(html_tables.precisions(report))),
        Part("Every network that was measured", _measured(report, pictures)),
        Part("Latencies", _latencies(report, pictures)),
        *_tables(report, pictures),
        Part(layers.TITLE, _layers(report)),
        Part(reliability.TITLE, _reliability(report, pictures)),
        Part("The price of knowing", _table(html_tables.ensemble(report))),
        Part("Would more images help?", _leakage(report)),
        Part("Calibration images made from the original alone", _synthesized(report)),
        Part("Environment", _environment(report)),
        Part("How to reproduce", _reproduce(report)),
    ]


def _table(found: Sheet | None) -> str:
    return "" if found is None else table(found)


def _measured(report: Report, pictures: Pictures) -> str:
    drawn = html_tradeoff.size_figure(report)
    numbers = html_tradeoff.size_sheet(report)
    size = table(numbers) if drawn is None else pictures.draw(drawn, numbers=numbers)
    return table(html_tradeoff.sheet(report), hidden_title=True) + size


def _latencies(report: Report, pictures: Pictures) -> str:
    shown = html_tables.distributions(report)
    drawn = pictures.draw(html_tables.distribution_figure(report))
    return table(shown) + drawn + _table(html_tables.engines(report))


def _tables(report: Report, pictures: Pictures) -> list[Part]:
    """The method's tables, each with the figures of its title; then the other figures together."""
    parts = []
    for one in report.tables:
        mine = [pictures.draw(drawn) for drawn in report.figures if drawn.title == one.title]
        parts.append(Part(one.title, table(sheet(one), hidden_title=True) + "".join(mine)))
    titles = {one.title for one in report.tables}
    rest = [pictures.draw(drawn) for drawn in report.figures if drawn.title not in titles]
    if rest:
        parts.append(Part("Figures", f'<div class="pictures">{"".join(rest)}</div>'))
    return parts


def _layers(report: Report) -> str:
    if report.layers is None:
        return ""
    return prose(layers.note(report.layers)) + "".join(
        table(sheet(one)) for one in layers.tables(report.layers)
    )


def _reliability(report: Report, pictures: Pictures) -> str:
    found, drawn = reliability.table(report), reliability.figure(report)
    if found is None or drawn is None:
        return ""
    return table(sheet(found), hidden_title=True) + pictures.draw(drawn)


def _leakage(report: Report) -> str:
    section = leakage.section(report.leakage)
    return prose(section.removeprefix("**Would more images help?** ")) if section else ""


def _synthesized(report: Report) -> str:
    data = report.data
    if data.contact_sheet is None:
        return ""
    # A scheme cannot be spelt without its colon, so that this names a file beside the page or nothing.
    link = quote(data.contact_sheet)
    return (
        f'<p>{data.calibration_count} images were synthesised; <a href="{link}">the first of them</a> are '
        "shown in a file beside this one.</p>"
    )


def _environment(report: Report) -> str:
    environment, data, target = report.environment, report.data, report.target
    made = "" if data.contact_sheet is None else "synthesised "
    validated = f"validation {data.validation_count} others, " if data.validation_count else ""
    evaluated = f"evaluation {data.evaluation_count} others"
    threads = [] if target.threads is None else [("threads", str(target.threads))]
    options = ", ".join(f"{name} = {value}" for name, value in target.options)
    facts = [
        ("executed on", environment.executed_on),
        ("platform", environment.platform),
        ("target", f"{target.backend}, {target.precision}, batch {target.batch}, input {target.input_shape}"),
        *threads,
        *([("options", options)] if options else []),
        *_clocks(report),
        ("images", f"calibration {data.calibration_count} {made}images, {validated}{evaluated}"),
        ("recovery", _recovery(report.recover)),
        ("versions", f"optpipe {environment.optpipe}, Python {environment.python}"),
    ]
    named = tuple((Entry(name), Entry(number)) for name, number in environment.versions.items())
    versions = Sheet("Versions", ("package", "version"), named)
    stages = Sheet(
        "Stages",
        ("stage", "seconds"),
        tuple((Entry(name), Entry(f"{one.seconds:.1f}", one.seconds)) for name, one in report.stages.items()),
    )
    return f"{_facts(facts)}\n{table(stages)}\n{table(versions)}"


def _facts(facts: Sequence[tuple[str, str]]) -> str:
    shown = "".join(f"<dt>{text(name)}</dt><dd>{text(value)}</dd>" for name, value in facts)
    return f'<dl class="facts">{shown}</dl>'


def _recovery(recover: Tune) -> str:
    if not recover.steps:
        return "none"
    taught = "" if recover.teachers == "none" else f", teachers {recover.teachers}"
    return f"{recover.steps} steps of batch {recover.batch}, loss {recover.loss}{taught}"


def _clocks(report: Report) -> list[tuple[str, str]]:
    """The GPU's state around each timing; nothing where none was read."""
    timed = [("original", report.original.latency)]
    timed += [(f"result, {one.precision}", one.latency) for one in report.precisions if one.latency]
    return [
        (f"GPU around timing the {name}", f"{_state(latency.before)}; {_state(latency.after)}")
        for name, latency in timed
        if latency.before is not None or latency.after is not None
    ]


def _state(state: DeviceState | None) -> str:
    if state is None:
        return "not read"
    held = f", throttled: {', '.join(state.throttle)}" if state.throttle else ""
    return f"SM {state.sm_clock_mhz} MHz, memory {state.memory_clock_mhz} MHz, {state.temperature_c} C{held}"


def _reproduce(report: Report) -> str:
    data = report.data
    hashes = [*report.sha256.items(), ("calibration images", data.calibration_sha256)]
    if data.validation_sha256 is not None:
        hashes.append(("validation images", data.validation_sha256))
    hashes.append(("evaluation images", data.evaluation_sha256))
    rows = tuple((Entry(name), Entry(value)) for name, value in hashes)
    return (
        "<p>The run's folder holds its recipe with every default written out, <code>recipe.toml</code>. Put "
        "it where the recipe lay that the run was begun with, since it names files relative to there, and "
        "run <code>optpipe run recipe.toml --out FOLDER</code> with optpipe "
        f"{text(report.environment.optpipe)} (seed {report.seed}). Weights and images are the same where "
        "these sums are; latencies are those of the machine.</p>\n"
        f"{table(Sheet('sha256', ('what', 'sha256'), rows))}"
    )
