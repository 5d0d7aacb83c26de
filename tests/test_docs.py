"""README.md and docs/: commands are taken, links lead somewhere, and what is generated is fresh.

A command line in a fenced block, a table or between backticks is parsed by the command line itself or by the
benchmark's own parser. Those in fenced blocks are executed too, ``optpipe run`` as a dry run; those that no
test can execute stand behind ``<!-- not executed: REASON -->``.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import inspect
import json
import re
import shlex
import sys
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import click
import pytest
from conftest import Call, make_report

import optpipe as package
from benchmarks import dllp, ekg, practise, three_d
from docs import reference
from optpipe import cli, files, plugins, store
from optpipe import recipe as recipes
from optpipe.types import Limits

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
RESULTS = ROOT / "benchmarks" / "results"
MARKER = re.compile(r"<!-- not executed: .+ -->")
PLACEHOLDER = re.compile(r"[\[\]|]|\.\.\.|\b(?:RUN|RECIPE|MODEL|NAME|FILE|IMAGE|OLD_RUN)\b|^--")


@dataclass(frozen=True, slots=True)
class Line:
    """A command line of a page: as words, where it stands, whether it is to be executed."""

    page: str
    text: str
    executed: bool

    @property
    def words(self) -> list[str]:
        """Without variables of the environment and what follows in a comment."""
        return [word for word in shlex.split(self.text, comments=True) if not re.match(r"[A-Z_]+=", word)]

    @property
    def is_usage(self) -> bool:
        """Whether it says how a command is used, with names in capitals for what is to be given."""
        return any(PLACEHOLDER.search(word) for word in self.words[1:] if not word.startswith("--"))

    def __str__(self) -> str:
        return f"{self.page}: {self.text}"


COMMAND = re.compile(r"^(?:[A-Z_]+=\S+ )?(?:optpipe [a-z]|python -m (?:benchmarks|docs)\.).*")


def lines(path: Path) -> Iterator[Line]:
    """Every command line of a page, once."""
    text = path.read_text(encoding="utf-8")
    fences = re.compile(r"^((?:<!--[^\n]*-->\n)?)```(\w*)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
    found: dict[str, Line] = {}
    for marker, language, block in fences.findall(text):
        if language in ("", "bash", "console"):
            for line in re.sub(r"\\\n\s*", "", block).splitlines():
                command = line.removeprefix("$ ").strip()
                if COMMAND.match(command):
                    found[command] = Line(path.name, command, not MARKER.match(marker))
        if language == "yaml":
            for command in re.findall(r"- (?:run: )?(optpipe .*)", block):
                found.setdefault(command, Line(path.name, command, executed=False))
    prose = fences.sub("", text)
    for quoted in re.findall(r"`([^`\n]+(?:\n[^`\n]+)?)`", prose):
        command = " ".join(quoted.replace("\\|", "|").split())
        if COMMAND.match(command):
            found.setdefault(command, Line(path.name, command, executed=False))
    yield from found.values()


LINES = [line for path in PAGES for line in lines(path)]
WHOLE = [line for line in LINES if line.words[0] == "optpipe" and not line.is_usage]
USAGE = [line for line in LINES if line.words[0] == "optpipe" and line.is_usage]
MODULES = [line for line in LINES if line.words[0] == "python" and not line.is_usage]


def test_commands_are_found() -> None:
    assert len(WHOLE) >= 10
    assert len(USAGE) >= 10
    assert len(MODULES) >= 20


@pytest.mark.parametrize("line", WHOLE, ids=str)
def test_a_command_is_one_that_the_command_line_takes(line: Line) -> None:
    name, *arguments = line.words[1:]
    command = cli.cli.commands[name]
    if arguments:
        command.make_context(name, arguments)  # raises click.UsageError


@pytest.mark.parametrize("line", USAGE, ids=str)
def test_the_options_of_a_usage_line_are_there(line: Line) -> None:
    command = cli.cli.commands[line.words[1]]
    there = {option for parameter in command.params for option in parameter.opts}
    assert set(re.findall(r"--\w[\w-]*", line.text)) <= there


def test_every_command_is_in_the_readmes_table() -> None:
    table = (ROOT / "README.md").read_text().split("<!-- usage -->")[1].split("\n\n")[0]
    assert set(re.findall(r"^\| `optpipe (\w+)", table, re.MULTILINE)) == set(cli.cli.commands)


def parsed(line: Line, monkeypatch: pytest.MonkeyPatch) -> argparse.Namespace:
    """What the parser of ``python -m MODULE`` makes of the words; nothing is run."""
    module = importlib.import_module(line.words[2])
    real = argparse.ArgumentParser.parse_args

    class ParsedError(Exception):
        pass

    seen: list[argparse.Namespace] = []

    def parse(self: argparse.ArgumentParser, *given: Any, **named: Any) -> NoReturn:
        seen.append(real(self, *given, **named))
        raise ParsedError

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse)
    monkeypatch.setattr(sys, "argv", line.words[2:])
    with pytest.raises(ParsedError):
        module.main()
    return seen[0]


@pytest.mark.parametrize("line", [line for line in MODULES if line.words[2] != "docs.reference"], ids=str)
def test_a_benchmark_is_one_that_its_parser_takes(line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    parsed(line, monkeypatch)


def test_a_renamed_option_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit):
        parsed(Line("", "python -m benchmarks.ekg macs --epoch 2", executed=False), monkeypatch)
    with pytest.raises(click.UsageError, match="--max-acuracy-drop"):
        cli.cli.commands["gate"].make_context("gate", ["run", "--max-acuracy-drop", "1"])


# ---------------------------------------------------------------- executed


def test_a_command_in_a_block_is_executed_or_says_why_not() -> None:
    unknown = [str(line) for line in LINES if line.executed and line.words[1] not in EXECUTED]
    assert unknown == [], "execute it below, or write <!-- not executed: REASON --> above the block"


def dry_run(call: Call, words: list[str]) -> None:
    code, out, error = call("run", *words[2:], "--dry-run")
    assert code == 0, error
    assert out.startswith("[model]\n")


def gate(call: Call, words: list[str]) -> None:
    """On a report of the run's name, made for it; whether it passes is what the options say."""
    code, out, error = call(*words[1:])
    assert code in (0, 1), error
    assert re.match(r"(PASSED|FAILED|UNCERTAIN) ", out)


EXECUTED: dict[str, Callable[[Call, list[str]], None]] = {"run": dry_run, "gate": gate}


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with what is shipped, and finished runs under the names that the pages use."""
    for name in ("recipes", "calibration_data"):
        (tmp_path / name).symlink_to(ROOT / name)
    report = replace(make_report(), sha256={"original weights": "0" * 64})
    for place in ("runs/practise/report.json", "ci/baseline.json"):
        files.write_atomically(tmp_path / place, store.to_json(report))
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("GITHUB_STEP_SUMMARY", raising=False)
    return tmp_path


@pytest.mark.parametrize("line", dict.fromkeys(line.text for line in LINES if line.executed))
def test_a_command_in_a_block_does_what_it_says(checkout: Path, optpipe: Call, line: str) -> None:
    words = shlex.split(line)
    EXECUTED[words[1]](optpipe, words)


# ---------------------------------------------------------------- figures and their commands


def table_rows() -> list[tuple[str, Line]]:
    text = (ROOT / "docs" / "measurements.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| \[`([^`]+)`\][^|]*\| `([^`]+)` \|$", text, re.MULTILINE)
    return [(name, Line("measurements.md", command, executed=False)) for name, command in rows]


def test_every_result_has_a_command() -> None:
    earlier = {"three_d_latency-resnet20-8epochs", "three_d_macs-resnet20-8epochs"}
    assert {name for name, _ in table_rows()} | earlier == {path.stem for path in RESULTS.glob("*.md")}


SETTINGS = {
    "ekg": (ekg.parse, ekg.suffix, ekg.settings_of),
    "dllp": (dllp.parse, dllp.named, dllp.settings_of),
    "three_d": (three_d.parse, three_d.named, three_d.settings_of),
    "practise": (practise.parse, practise.named, practise.settings_of),
}


@pytest.mark.parametrize(
    ("name", "line"),
    [(name, line) for name, line in table_rows() if line.words[2].split(".")[1] in SETTINGS],
    ids=str,
)
def test_a_command_makes_the_results_beside_it(name: str, line: Line) -> None:
    """By the name of its file, and by the settings that are stored in it."""
    benchmark = line.words[2].split(".")[1]
    parse, named, settings_of = SETTINGS[benchmark]
    arguments = parse(line.words[3:])
    assert f"{benchmark}_{arguments.table}{named(arguments)}" == name
    if arguments.table == "correlation":
        return
    stored = json.loads((RESULTS / f"{name}.json").read_text())["settings"]
    settings = settings_of(arguments)
    for key in ("table", "network", "epochs", "steps", "overrides", "workers"):
        if hasattr(settings, key):
            value = getattr(settings, key)
            assert (list(value) if isinstance(value, tuple) else value) == stored[key], key


# ---------------------------------------------------------------- pages


def test_the_page_of_recipes_is_what_the_code_says() -> None:
    assert reference.PAGE.read_text(encoding="utf-8") == reference.render(), "run python -m docs.reference"


def test_a_key_of_which_nothing_is_said_is_an_error() -> None:
    @dataclass(frozen=True)
    class Table:
        """A table. ``other`` is no key of it."""

        key: int = 0

    with pytest.raises(reference.UnexplainedError, match=r"Table: its docstring says nothing of \['key'\]"):
        reference.explained(Table)


def blocks(path: Path, language: str) -> list[str]:
    pattern = rf"^```{language}[^\n]*\n(.*?)^```$"
    return re.findall(pattern, path.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def test_the_recipes_on_the_pages_are_ones_that_are_taken() -> None:
    (shown,) = blocks(ROOT / "README.md", "toml")
    commented = shown.replace("# validation =", "validation =")
    for text in (shown, commented, *blocks(ROOT / "docs" / "recipes.md", "toml")):
        loaded = recipes.from_tables(tomllib.loads(text), ROOT / "shown.toml")
        assert plugins.method(loaded.method_name)
        recipes.bind(plugins.method(loaded.method_name).Config, loaded.method, loaded.path, "method")
    (limits,) = blocks(ROOT / "docs" / "ci.md", "toml")
    table = tomllib.loads(limits)["gate"]
    assert recipes.bind(Limits, table, ROOT / "shown.toml", "gate") == Limits(1.0, None, 20.0)


def anchors(path: Path) -> set[str]:
    """GitHub's anchors of a page's headings."""
    text = re.sub(r"^```.*?^```$", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_every_link_leads_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text(encoding="utf-8")):
        assert "://" not in target, "the documentation stands by itself"
        file, _, anchor = target.partition("#")
        page = path if not file else path.parent / file
        assert page.exists(), target
        assert not anchor or anchor in anchors(page), target


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_files_that_are_named_are_there(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    named = re.findall(r"`((?:recipes|examples|benchmarks|calibration_data|optpipe|tests)/[\w./*-]+)`", text)
    missing = [name for name in named if not list(ROOT.glob(name.rstrip("/").replace("…", "*")))]
    assert missing == []


def test_what_make_is_told_in_the_readme_it_can_do() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    text = "".join(path.read_text(encoding="utf-8") for path in PAGES)
    told = set(re.findall(r"(?:`|^|\()make ([a-z-]+)", text, re.MULTILINE))
    assert {"demo", "test"} <= told <= targets


def test_the_readme_can_be_read_in_one_sitting() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 200


def test_the_picture_is_small_and_of_the_size_that_a_page_takes() -> None:
    from PIL import Image

    path = ROOT / "docs" / "images" / "report.png"
    assert path.stat().st_size < 200_000
    with Image.open(path) as image:
        assert image.size == (1280, 900)


# ---------------------------------------------------------------- Python

PYTHON = "\n".join(blocks(ROOT / "docs" / "python.md", "python"))


def test_the_calls_of_the_page_are_ones_that_the_package_takes() -> None:
    """Quick, in the place of running them: each name is there, and each takes the arguments given."""
    calls = [
        node
        for node in ast.walk(ast.parse(PYTHON))
        if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("optpipe.")
    ]
    assert len(calls) >= 5
    for node in calls:
        function = getattr(package, ast.unparse(node.func).removeprefix("optpipe."))
        named = {keyword.arg: None for keyword in node.keywords if keyword.arg is not None}
        inspect.signature(function).bind(*node.args, **named)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_blocks_of_the_page_run(checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    namespace: dict[str, Any] = {}
    exec(compile(PYTHON, "python.md", "exec"), namespace)
    assert namespace["logits"].shape == (4, 10)
    out = capsys.readouterr().out
    assert out.startswith("practise: practise on zoo:resnet20_cifar")
    assert "latency_reduction = 22" in out
