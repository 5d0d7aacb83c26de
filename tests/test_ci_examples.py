"""The files in examples/ci: what a schema, a shell and the command line can say of them."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import subprocess
import sys
import tomllib
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import click
import pytest
from conftest import make_report

from optpipe import cli, files, store
from optpipe import recipe as recipes

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples" / "ci"
GITHUB = EXAMPLES / "github-actions.yml"
GITLAB = EXAMPLES / "gitlab-ci.yml"
DOCKERFILE = EXAMPLES / "Dockerfile"
SCHEMAS = {
    GITHUB: ("--builtin-schema", "vendor.github-workflows"),
    GITLAB: ("--builtin-schema", "vendor.gitlab-ci", "--data-transform", "gitlab-ci"),
}

linted = pytest.mark.skipif(
    importlib.util.find_spec("check_jsonschema") is None,
    reason="check-jsonschema, which holds both schemas, is not installed: pip install -e '.[dev]'",
)


def lint(path: Path, schema: tuple[str, ...]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "check_jsonschema", *schema, str(path)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@linted
@pytest.mark.parametrize("path", SCHEMAS, ids=lambda path: path.name)
def test_an_example_is_as_its_schema_says(path: Path) -> None:
    done = lint(path, SCHEMAS[path])
    assert done.returncode == 0, done.stdout + done.stderr


@linted
@pytest.mark.parametrize(
    ("path", "old", "new"),
    [(GITHUB, "    runs-on:", "    run-on:"), (GITLAB, "  tags:", "  tag:")],
    ids=["github", "gitlab"],
)
def test_the_schema_finds_what_is_wrong(tmp_path: Path, path: Path, old: str, new: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert old in text
    wrong = tmp_path / path.name
    wrong.write_text(text.replace(old, new), encoding="utf-8")
    assert lint(wrong, SCHEMAS[path]).returncode == 1


def commands(path: Path) -> list[list[str]]:
    """Every command line of optpipe in a file, as words; continued lines are joined."""
    text = re.sub(r"\\\n\s*", "", path.read_text(encoding="utf-8"))
    found = re.findall(r"^(?!#)[^#\n]*?\b(optpipe (?:run|gate|doctor)[^\n]*)", text, re.MULTILINE)
    return [shlex.split(line)[1:] for line in found]


@pytest.mark.parametrize(("path", "count"), [(GITHUB, 5), (GITLAB, 5)], ids=["github", "gitlab"])
def test_every_command_is_one_that_the_command_line_takes(path: Path, count: int) -> None:
    lines = commands(path)
    assert len(lines) == count
    for words in lines:
        arguments = [word for word in words[1:] if word != "${against[@]}"]
        cli.cli.commands[words[0]].make_context(words[0], arguments)  # raises click.UsageError


def test_a_word_that_is_no_option_is_found() -> None:
    with pytest.raises(click.UsageError, match="--max-acuracy-drop"):
        cli.cli.commands["gate"].make_context("gate", ["run", "--max-acuracy-drop", "1"])


@pytest.mark.parametrize("path", [GITHUB, GITLAB], ids=["github", "gitlab"])
def test_the_recipe_is_there_and_its_run_is_the_one_that_is_gated(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    recipe, run = re.search(r"RECIPE: (\S+)", text), re.search(r"RUN: (\S+)", text)
    assert recipe is not None and run is not None
    assert f"runs/{recipes.load(ROOT / recipe[1]).run.name}" == run[1]


@pytest.mark.parametrize(("regressed", "code"), [(None, 0), (False, 0), (True, 1)])
def test_the_gate_of_the_workflow_runs(tmp_path: Path, regressed: bool | None, code: int) -> None:
    """Its own script, in bash as GitHub calls it; without a baseline, with one, with one that was faster."""
    text = GITHUB.read_text(encoding="utf-8")
    script = text.split("run: |\n", 1)[1].split("      - name:", 1)[0]
    report = replace(make_report(), sha256={"original weights": "0" * 64})
    files.write_atomically(tmp_path / "runs" / "practise" / "report.json", store.to_json(report))
    if regressed is not None:
        ratio = 0.5 if regressed else 0.75
        old = replace(make_report(ratio=ratio, ci95=(ratio - 0.01, ratio + 0.01)), sha256=report.sha256)
        files.write_atomically(tmp_path / "ci" / "baseline.json", store.to_json(old))
    shim = tmp_path / "optpipe"
    shim.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m optpipe.cli "$@"\n')
    shim.chmod(0o755)
    page = tmp_path / "summary.md"
    done = subprocess.run(
        ["bash", "-e", "-o", "pipefail", "-c", script],
        cwd=tmp_path,
        env={
            **os.environ,
            "PATH": f"{tmp_path}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "RUN": "runs/practise",
            "GITHUB_STEP_SUMMARY": str(page),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == code, done.stdout + done.stderr
    suite = ElementTree.parse(tmp_path / "runs" / "practise" / "gate.xml").getroot()
    assert suite.get("tests") == ("2" if regressed is None else "4")
    assert page.read_text().startswith("### optpipe gate: practise ")


# ---------------------------------------------------------------- the image


def test_the_image_is_a_build_argument_and_never_the_latest() -> None:
    text = DOCKERFILE.read_text(encoding="utf-8")
    tag = re.search(r"^ARG TENSORRT_TAG=(\S+)$", text, re.MULTILINE)
    assert tag is not None and re.fullmatch(r"\d\d\.\d\d-py3", tag[1])
    assert "FROM nvcr.io/nvidia/tensorrt:${TENSORRT_TAG}\n" in text


def test_the_image_copies_what_is_there_and_installs_an_extra_that_exists() -> None:
    text = DOCKERFILE.read_text(encoding="utf-8")
    for line in re.findall(r"^COPY (.+)$", text, re.MULTILINE):
        for name in line.split()[:-1]:
            assert (ROOT / name).exists(), name
    extra = re.search(r"'/src\[(\w+)\]'", text)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert extra is not None and extra[1] in project["optional-dependencies"]
    for name in (project["readme"], *project["license-files"]):
        assert re.search(rf"^COPY .*\b{re.escape(name)}\b", text, re.MULTILINE), f"the build needs {name}"
