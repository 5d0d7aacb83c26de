"""Nothing is unpickled, code runs only where a user's own recipe names it, and markup is text."""

from __future__ import annotations

import ast
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

import optpipe
from faults import cases
from faults.networks import MARK
from faults.workspace import both, json_at, listed, recipe, wrote
from optpipe import models
from optpipe.models import ModelSpec

PACKAGE = Path(optpipe.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))

RUNS_CODE = {
    *("pickle.load", "pickle.loads", "pickle.Unpickler", "marshal.load", "marshal.loads", "shelve.open"),
    *("joblib.load", "dill.load", "torch.jit.load", "torch.export.load", "yaml.load", "eval", "exec"),
}
WRITES_WHERE_IT_LIKES = {"extract", "extractall", "unpack_archive"}


def untrusted(tree: ast.AST) -> Iterator[str]:
    """Every call that runs code which a file holds, or writes where an archive says."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        given = {word.arg: ast.unparse(word.value) for word in node.keywords}
        if called in {"np.load", "numpy.load"} and given.get("allow_pickle") != "False":
            yield f"{node.lineno}: {called} without allow_pickle=False"
        elif called == "torch.load" and given.get("weights_only") != "True":
            yield f"{node.lineno}: torch.load without weights_only=True"
        elif called in RUNS_CODE or called.split(".")[-1] in WRITES_WHERE_IT_LIKES:
            yield f"{node.lineno}: {called}"


def test_nothing_is_unpickled_or_unpacked() -> None:
    found = {
        f"{path.relative_to(PACKAGE)}: {call.partition(': ')[2]}"
        for path in FILES
        for call in untrusted(ast.parse(path.read_text(encoding="utf-8")))
    }
    # The program that the run itself exported, or that a bundle lists with its digest.
    assert found == {"backends/_inductor_compile.py: torch.export.load"}


@pytest.mark.parametrize(
    "line",
    [
        "np.load(path)",
        "np.load(path, allow_pickle=True)",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "pickle.loads(content)",
        "eval(text)",
        "archive.extractall(folder)",
    ],
)
def test_what_would_be_unpickled_is_found(line: str) -> None:
    assert list(untrusted(ast.parse(line))) != []


# ---------------------------------------------------------------- code that a recipe names

SPY = f"open({MARK!r}, 'w').close()\ndef network(**sizes): ...\ndef images(): ...\n"
ZOO = recipe('name = "mine:network"\nweights = "weights.pth"', 'name = "zoo:resnet20_cifar"')


def copied(good: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "case"
    shutil.copytree(good, folder)
    return folder


@pytest.mark.parametrize(
    ("words", "place"),
    [
        (("run", "small.toml", "--dry-run"), '[model] name = "mine:network"'),
        (("inspect", "small.toml"), '[model] name = "mine:network"'),
        (("sweep", "small.toml", "--latency", "0.1", "--dry-run"), '[model] name = "mine:network"'),
        (("init", "mine:network"), 'MODEL = "mine:network"'),
        (("init", "zoo:resnet20_cifar", "--calibration", "mine:images"), '--calibration = "mine:images"'),
        (("init", "zoo:resnet20_cifar", "--evaluation", "mine:images"), '--evaluation = "mine:images"'),
    ],
)
def test_no_code_is_refused_before_it_is_imported(
    words: tuple[str, ...], place: str, good: Path, tmp_path: Path
) -> None:
    folder = copied(good, tmp_path)
    wrote("mine.py", SPY)(folder)
    found = cases.call((*words, "--no-code"), folder)
    assert (found.code, cases.unclear(found), found.out) == (2, [], "")
    assert f"{place}: is code, which --no-code lets none run of" in found.err
    assert not (folder / MARK).exists()
    cases.call(words, folder)
    assert (folder / MARK).exists(), "without --no-code the same command runs it"


@pytest.mark.parametrize("key", ["calibration", "evaluation"])
def test_images_of_a_function_are_code_too(key: str, good: Path, tmp_path: Path) -> None:
    folder = copied(good, tmp_path)
    both(ZOO, wrote("mine.py", SPY))(folder)
    override = f'data.{key}.source="mine:images"'
    found = cases.call(("run", "small.toml", "--dry-run", "--no-code", "--set", override), folder)
    assert (found.code, cases.unclear(found)) == (2, [])
    assert f'[data.{key}] source = "mine:images": is code' in found.err
    assert not (folder / MARK).exists()


def test_a_recipe_without_code_goes_on_as_ever(good: Path, tmp_path: Path) -> None:
    folder = copied(good, tmp_path)
    ZOO(folder)
    for words in (("run", "small.toml", "--dry-run"), ("inspect", "small.toml")):
        assert cases.call((*words, "--no-code"), folder) == cases.call(words, folder)


def test_a_bundle_has_nothing_imported_from_beside_it(good: Path, tmp_path: Path) -> None:
    folder = copied(good, tmp_path)
    bundle = folder / "run" / "deploy"
    (bundle / "evil.py").write_text(SPY, encoding="utf-8")
    for home in (str(bundle), f"{bundle}/../deploy", "run/deploy"):
        plan = json.loads((good / "run/deploy/plan.json").read_text(encoding="utf-8"))
        plan["search_folder"], plan["model"]["name"] = home, "evil:network"
        wrote("run/deploy/plan.json", json.dumps(plan))(folder)
        listed("plan.json")(folder)
        found = cases.call(("load",), folder)
        assert (found.code, cases.unclear(found)) == (2, [])
        assert "search_folder" in found.err
        given = models.load_model(ModelSpec("mine:network", classes=4), good)
        assert not optpipe.load(folder / "run", model=given).training
    assert not (folder / MARK).exists()


# ---------------------------------------------------------------- what is shown

MARKUP = "<script>alert(1)</script><img src=x onerror=alert(1)>"


def test_markup_in_a_report_is_shown_and_not_run(good: Path, tmp_path: Path) -> None:
    folder = copied(good, tmp_path)
    for keys in (
        ("name",),
        ("method",),
        ("model",),
        ("reason",),
        ("tables", 0, "title"),
        ("tables", 0, "columns", 0),
        ("tables", 0, "rows", 0, 0),
        ("environment", "executed_on"),
        ("warnings",),
    ):
        value = [MARKUP] if keys == ("warnings",) else MARKUP
        json_at("run/report.json", *keys, value=value)(folder)
    assert cases.call(("report", "run"), folder).code == 0
    page = (folder / "run" / "report.html").read_text(encoding="utf-8")
    assert "<script>alert" not in page
    assert "<img src=x" not in page
    assert page.count("&lt;script&gt;alert(1)") >= 9
    assert "default-src 'none'" in page


def test_mathematics_in_a_name_is_no_formula(good: Path, tmp_path: Path) -> None:
    folder = copied(good, tmp_path)
    for keys in (("name",), ("method",), ("model",), ("tables", 0, "title")):
        json_at("run/report.json", *keys, value=r"$\frac{1}{$ a_b $")(folder)
    found = cases.call(("report", "run"), folder)
    assert (found.code, found.err) == (0, "")
    assert cases.call(("compare", "run", "run", "--out", "compared"), folder).code == 0


def test_a_page_that_is_a_link_is_replaced_and_not_followed(good: Path, tmp_path: Path) -> None:
    folder = copied(good, tmp_path)
    (folder / "precious.txt").write_text("precious", encoding="utf-8")
    (folder / "run" / "report.html").unlink()
    (folder / "run" / "report.html").symlink_to(folder / "precious.txt")
    assert cases.call(("report", "run"), folder).code == 0
    assert (folder / "precious.txt").read_text(encoding="utf-8") == "precious"
    assert not (folder / "run" / "report.html").is_symlink()
