"""Write docs/recipes.md from the dataclasses that recipes are bound to: ``python -m docs.reference``.

What a key means is what its class's docstring says of it: the sentences that name it, with those that follow
in the same paragraph and name no other. A key of which nothing is said is an error.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import types
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from optpipe import plugins
from optpipe import recipe as recipes
from optpipe.data import DataSpec, Preprocess
from optpipe.models import ModelSpec
from optpipe.precision import Settings
from optpipe.types import Budget, Limits, Synthesis, Tune

PAGE = Path(__file__).parent / "recipes.md"

HEAD = """\
# Recipes

*Written by `python -m docs.reference` from the code; edit the docstrings there, not this page.*

A recipe is a TOML file: what to optimise, with which images, for which target, by which method, to which
budget. `[model]`, `[data]`, `[method]` and `[budget]` must be there; whatever else is left out has the
default given here. This is one, complete; [README](../README.md) goes through it line by line.

```toml
{example}```

- Relative paths start at the recipe's folder. `${{NAME}}` and `${{NAME:-default}}` take environment
variables. - `optpipe run RECIPE --dry-run` checks everything and prints the recipe with every default written
out; the run
  keeps that copy as its `recipe.toml`.
- `--set table.key=value` replaces a value: `optpipe run RECIPE --set budget.latency_reduction=0.3`.
- An unknown or ill-typed key is one line that names file, table, key, value and the nearest valid key.
- `optpipe init MODEL` writes a commented recipe for your own network.
"""


RECOVER = (
    "`name` (a method's, also as `recover = \"ekg\"` above the first table) takes that method's recovery for "
    "the chosen one's own. `steps = 0` ships the network as the search leaves it."
)


@dataclass(frozen=True, slots=True)
class Section:
    """A table of a recipe: its heading, the class it is bound to, and a sentence for what the class lacks."""

    title: str
    cls: type
    note: str = ""


class UnexplainedError(Exception):
    """A key of which its class's docstring says nothing."""


def main() -> None:
    """Write the page."""
    PAGE.write_text(render(), encoding="utf-8")
    print(f"{PAGE}: written")


def render() -> str:
    """The whole page."""
    example = (PAGE.parents[1] / "recipes" / "practise.toml").read_text(encoding="utf-8")
    without_comment = example.split("\n\n", 1)[1]
    parts = [HEAD.format(example=without_comment)]
    found = [*_sections()]
    titles = [section.title for section in found]
    parts.append("Tables: " + ", ".join(f"[{_code(title)}](#{_anchor(title)})" for title in titles) + ".\n")
    for section in found:
        parts.append(_section(section))
        if section.cls is Tune:
            parts.append(_recoveries())
    return "\n".join(parts)


def _sections() -> Iterator[Section]:
    yield Section("[model]", ModelSpec)
    yield Section("[data]", recipes.DataTable)
    where = "`[data.calibration]`, `[data.evaluation]` and `[data.validation]` have the same keys."
    yield Section("[data.calibration]", DataSpec, where)
    yield Section("[data.preprocess]", Preprocess)
    yield Section("[data.synthesize]", Synthesis, 'Only with `[data.calibration] source = "synthesize"`.')
    yield Section(
        "[target]", recipes.TargetTable, "The backends and their `options`: [backends](backends.md)."
    )
    yield Section("[export]", recipes.ExportTable)
    yield Section("[export.quantize]", Settings)
    yield Section("[timing]", recipes.TimingTable)
    for name in _methods():
        method = plugins.method(name)
        labels = "Needs labelled calibration images." if method.NEEDS_LABELS else "Needs no labels."
        note = f'`name = "{name}"`. {labels} What it does: [methods](methods.md#{name}).'
        yield Section(f"[method] {name}", method.Config, note)
    yield Section("[recover]", Tune, RECOVER)
    yield Section("[budget]", Budget)
    yield Section("[run]", recipes.RunTable, "`name` is the recipe's file name where it is left out.")
    yield Section("[report]", recipes.ReportTable)
    yield Section("[gate]", Limits, "What `optpipe gate` holds the finished run against: [CI](ci.md).")


def _methods() -> list[str]:
    """optpipe's own methods; those of plug-ins are not this page's."""
    return [name for name in plugins.names("methods") if (_package("methods") / name).is_dir()]


def _package(room: str) -> Path:
    return Path(inspect.getfile(recipes)).parents[1] / room


def _section(section: Section) -> str:
    general, meanings = explained(section.cls)
    hints = typing.get_type_hints(section.cls)
    said = " ".join(part for part in (general, section.note) if part)
    lines = [f"## {_code(section.title)}", "", said, "", "| key | type | default | |", "|---|---|---|---|"]
    first: dict[str, str] = {}
    for field in dataclasses.fields(section.cls):
        new = [sentence for sentence in meanings[field.name] if sentence not in first]
        old = dict.fromkeys(first[sentence] for sentence in meanings[field.name] if sentence in first)
        first |= dict.fromkeys(new, field.name)
        new += [f"See {', '.join(f'`{name}`' for name in old)}."] if old else []
        meaning = " ".join(new).replace("|", "\\|")
        lines.append(
            f"| `{field.name}` | {_type(hints[field.name])} | {_default(field, section)} | {meaning} |"
        )
    return "\n".join([*lines, ""])


def explained(cls: type) -> tuple[str, dict[str, list[str]]]:
    """What a class's docstring says of it, and the sentences on each of its fields, as Markdown.

    Raises:
        UnexplainedError: of a field nothing is said.
    """
    names = [field.name for field in dataclasses.fields(cls)]
    meanings: dict[str, list[str]] = {name: [] for name in names}
    general: list[str] = []
    summary, *paragraphs = (inspect.getdoc(cls) or "").split("\n\n")
    if not summary.startswith("The keys of"):
        general.append(_markdown(" ".join(summary.split())))
    for paragraph in paragraphs:
        about: list[str] = []
        for sentence in map(_markdown, _sentences(" ".join(paragraph.split()))):
            about = [name for name in names if f"`{name}`" in sentence] or about
            for name in about:
                meanings[name].append(sentence)
            if not about:
                general.append(sentence)
    silent = [name for name in names if not meanings[name]]
    if silent:
        raise UnexplainedError(f"{cls.__module__}.{cls.__name__}: its docstring says nothing of {silent}")
    return " ".join(general), meanings


def _sentences(text: str) -> list[str]:
    return re.split(r"(?<=[.])\s+(?=[A-Z`(\"])", text)


def _markdown(text: str) -> str:
    text = re.sub(r":\w+:`~?([\w.]+)`", r"`\1`", text)
    return text.replace("``", "`").replace("*", "\\*")


def _code(title: str) -> str:
    table, _, rest = title.partition(" ")
    return f"`{table}` {rest}".strip()


def _anchor(title: str) -> str:
    """GitHub's anchor of the heading."""
    return re.sub(r"[^\w -]", "", _code(title).lower()).strip().replace(" ", "-")


def _type(hint: object) -> str:
    """A type in TOML's words."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        kinds = [_type(one) for one in arguments if one is not type(None)]
        return " or ".join(dict.fromkeys(kinds))
    if origin is typing.Literal:
        return ", ".join(f"`{json.dumps(one)}`" for one in arguments)
    if origin is tuple:
        inner = [_type(one) for one in arguments if one is not Ellipsis]
        return f"list of {inner[0]}" if Ellipsis in arguments else f"[{', '.join(inner)}]"
    words = {str: "text", int: "integer", float: "number", bool: "true, false"}
    return words.get(typing.cast(type, hint), "table")


ELSEWHERE = {(recipes.RunTable, "name"): "see above", (Tune, "steps"): "the method's"}
"""Defaults that no field has."""


def _default(field: dataclasses.Field[object], section: Section) -> str:
    value = field.default
    if field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    if (section.cls, field.name) in ELSEWHERE:
        return ELSEWHERE[section.cls, field.name]
    if value is dataclasses.MISSING:
        return "must be given"
    if value is None or value == {} or dataclasses.is_dataclass(value):
        return ""
    return f"`{_toml(value)}`"


def _toml(value: object) -> str:
    return json.dumps(list(value) if isinstance(value, tuple) else value)


def _recoveries() -> str:
    """What the methods' own recoveries set otherwise than the defaults."""
    names = _methods()
    tunes = {name: plugins.method(name).RECOVER for name in names}
    fields = [field for field in dataclasses.fields(Tune) if _differs(field, list(tunes.values()))]
    rows = ["What the methods' own recoveries set:", "", f"| key | {' | '.join(names)} |"]
    rows.append("|---|" + "---|" * len(names))
    for field in fields:
        values = [getattr(tunes[name], field.name) for name in names]
        rows.append(f"| `{field.name}` | " + " | ".join(_cell(value) for value in values) + " |")
    return "\n".join([*rows, ""])


def _differs(field: dataclasses.Field[object], tunes: Sequence[Tune]) -> bool:
    return any(getattr(tune, field.name) != field.default for tune in tunes)


def _cell(value: object) -> str:
    return "" if value is None else f"`{_toml(value)}`"


if __name__ == "__main__":
    main()
