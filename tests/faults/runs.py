"""Finished runs that are damaged or come from a stranger: reports, bundles, engines."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from faults.cases import Case
from faults.images import encoded, npy, png
from faults.workspace import Change, both, cut, json_at, listed, nothing, wrote

GATE = ("gate", "run", "--max-accuracy-drop", "5")
COMPARE = ("compare", "run", "run")
REPORT = ("report", "run")
VERIFY = ("verify", "run")
BENCH = ("bench", "run", "--duration", "0.1", "--warmUp", "1")
REBUILD = ("rebuild", "run")
LANDSCAPE = ("landscape", "run")
ENGINE = ("run_engine",)
LOAD = ("load",)

REPORT_JSON = "run/report.json"
MANIFEST = "run/deploy/manifest.json"
PLAN = "run/deploy/plan.json"


def _each(
    name: str, make: Change, commands: Sequence[tuple[str, ...]], says: str, code: int = 2
) -> list[Case]:
    return [Case(f"{name}, {words[0]}", make, words, code, says) for words in commands]


def _report(name: str, *keys: str | int, value: object, says: str = "report.json") -> list[Case]:
    return _each(name, json_at(REPORT_JSON, *keys, value=value), (GATE, COMPARE, REPORT), says)


def _manifest(name: str, *keys: str | int, value: object, says: str = "manifest.json") -> list[Case]:
    return _each(name, json_at(MANIFEST, *keys, value=value), (VERIFY, BENCH, REBUILD, LOAD), says)


def _removed(name: str) -> Change:
    def change(folder: Path) -> None:
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return change


def _plan(*keys: str | int, value: object) -> Change:
    return both(json_at(PLAN, *keys, value=value), listed("plan.json"))


def _out(name: str) -> Change:
    """A file of the bundle moved out of it, with a link in its place."""

    def change(folder: Path) -> None:
        path = folder / "run" / "deploy" / name
        outside = folder / f"outside-{name}"
        path.rename(outside)
        path.symlink_to(outside)

    return change


def _named(name: str) -> Change:
    """The engine and its digest under another name."""

    def change(folder: Path) -> None:
        path = folder / MANIFEST
        manifest = json.loads(path.read_text(encoding="utf-8"))
        manifest["files"][name] = manifest["files"].pop("model.onnx")
        manifest["engines"][0].update(engine=name, source=name)
        path.write_text(json.dumps(manifest), encoding="utf-8")

    return change


def _outside_folder(folder: Path) -> Change:
    shutil.copyfile(folder / "run/deploy/model.onnx", folder / "run/outside.onnx")
    return _named("../outside.onnx")


def _climbing(folder: Path) -> None:
    _outside_folder(folder)(folder)


def _absolute(folder: Path) -> None:
    _named(str(folder / "model.onnx"))(folder)


def _hostile(folder: Path) -> None:
    """Code beside the plan, and the plan naming that place."""
    (folder / "run" / "deploy" / "evil.py").write_text("raise SystemExit('evil ran')", encoding="utf-8")
    _plan("model", "name", value="evil:network")(folder)
    _plan("search_folder", value=str(folder / "run" / "deploy"))(folder)


def _image(content: bytes, name: str = "x.png") -> Change:
    return wrote(name, content)


CASES = (
    # reports
    *_each(
        "no run", _removed("run"), (GATE, COMPARE, REPORT, VERIFY, BENCH, REBUILD, LANDSCAPE, LOAD), "run"
    ),
    *_each("a run without a report", _removed(REPORT_JSON), (GATE, COMPARE, REPORT), "there is no report"),
    *_each("an empty report", wrote(REPORT_JSON, ""), (GATE, COMPARE, REPORT), "is no report"),
    *_each("a report of a list", wrote(REPORT_JSON, "[]"), (GATE, COMPARE, REPORT), "is no report"),
    *_each("a report without anything", wrote(REPORT_JSON, "{}"), (GATE, COMPARE, REPORT), "is no report"),
    *_each("half a report", cut(REPORT_JSON, 0.5), (GATE, COMPARE, REPORT), "is no report"),
    *_each("a report in UTF-16", wrote(REPORT_JSON, "{}".encode("utf-16")), (GATE,), "is no report"),
    *_each("a report of zero bytes", wrote(REPORT_JSON, bytes(99)), (GATE,), "is no report"),
    *_each("a report nested 100000 deep", wrote(REPORT_JSON, "[" * 100_000), (GATE,), "is no report"),
    *_each("a report of a number of 5000 digits", wrote(REPORT_JSON, "9" * 5000), (GATE,), "is no report"),
    *_report("a report of another version", "schema", value="optpipe.report/99", says="is of version"),
    *_report("a latency of words", "result", "latency", "median_ms", value="fast", says="median_ms"),
    *_report("a latency of nothing", "result", "latency", "median_ms", value=0.0),
    *_report("an original of no latency", "original", "latency", "median_ms", value=0.0),
    *_report("an original of no size", "original", "parameters", value=0),
    *_report("an original of no work", "original", "macs", value=0),
    *_report("less than no images", "original", "quality", "count", value=-4),
    *_report("no images in a report", "original", "quality", "count", value=0),
    *_report("an accuracy of 700%", "result", "quality", "value", value=7.0),
    *_report("an interval upside down", "result", "quality", "ci95", value=[0.9, 0.1]),
    *_report("a ratio below 0", "result", "latency", "ratio_to_original", value=-1.0),
    *_report("a batch of none in a report", "target", "batch", value=0),
    *_each("a damaged gate", wrote("run/gate.json", "{"), (GATE,), "is damaged"),
    *_each(
        "a gate that cannot be meant", wrote("run/gate.json", '{"min_agreement": 0.99}'), (GATE,), "gate.json"
    ),
    *_each("no limits", nothing, (("gate", "run"),), "there is nothing to hold it against"),
    *_each("a limit that is none", nothing, (("gate", "run", "--min-agreement", "nan"),), "must be finite"),
    *_each(
        "a share for a percentage", nothing, (("gate", "run", "--min-agreement", "0.5"),), "is in percent"
    ),
    *_each("a precision that was not shipped", nothing, ((*GATE, "--precision", "int8"),), "int8"),
    *_each("a precision that is none", nothing, ((*GATE, "--precision", "fp7"),), "must be one of"),
    *_each("one run to compare", nothing, (("compare", "run"),), "at least two"),
    *_each("a file for a report", nothing, (("report", "mine.py"),), "is no run"),
    # what looks dangerous in a report and is shown as it is
    *(
        Case(
            f"{what} as a report's {key}, {words[0]}",
            json_at(REPORT_JSON, key, value=text),
            words,
            0,
            "",
            shows,
        )
        for what, text in (
            ("markup", "<script>alert(1)</script><img src=x onerror=alert(1)>"),
            ("mathematics", r"$\frac{1}{$ a_b^c $"),
            ("a terminal's codes", "\x1b[2J\x1b]0;hidden\x07"),
        )
        for key in ("name", "reason")
        for words, shows in ((GATE, "PASSED"), (COMPARE, "| #"))
    ),
    # manifests
    *_each("an empty manifest", wrote(MANIFEST, ""), (VERIFY, BENCH, REBUILD, LOAD, ENGINE), "manifest.json"),
    *_each("a manifest of a list", wrote(MANIFEST, "[]"), (VERIFY, LOAD, ENGINE), "manifest.json"),
    *_each("half a manifest", cut(MANIFEST, 0.5), (VERIFY, LOAD, ENGINE), "manifest.json"),
    *_each(
        "a manifest nested 100000 deep", wrote(MANIFEST, "[" * 100_000), (VERIFY, ENGINE), "manifest.json"
    ),
    *_each("a manifest of 5000 digits", wrote(MANIFEST, "9" * 5000), (VERIFY, ENGINE), "manifest.json"),
    *_each("a manifest in UTF-16", wrote(MANIFEST, "{}".encode("utf-16")), (VERIFY, ENGINE), "manifest.json"),
    *_manifest(
        "a manifest of another version", "schema", value="optpipe.manifest/99", says="optpipe.manifest/99"
    ),
    *_manifest("a bundle without engines", "engines", value=[]),
    *_manifest("a bundle for a batch of none", "target", "batch", value=0),
    *_manifest("a bundle for 10^18 pixels", "target", "input_shape", value=[3, 10**9, 10**9]),
    *_manifest("a bundle for less than nothing", "target", "input_shape", value=[3, -16, 16]),
    *_manifest("a bundle of one mean", "preprocess", "mean", value=[0.5]),
    *_manifest("a bundle of no deviation", "preprocess", "std", value=[0.0, 0.0, 0.0]),
    *_each(
        "a bundle of an unknown engine",
        json_at(MANIFEST, "target", "backend", value="quick"),
        (BENCH, REBUILD),
        "there is no such backend",
    ),
    *_each("a manifest that climbs", _climbing, (VERIFY, BENCH, REBUILD, LOAD), "outside the bundle"),
    *_each("a manifest that climbs", _climbing, (ENGINE,), "outside the bundle", 1),
    *_each("a manifest from the root", _absolute, (VERIFY, BENCH, REBUILD, LOAD), "outside the bundle"),
    *_each("a manifest from the root", _absolute, (ENGINE,), "outside the bundle", 1),
    *_each(
        "an engine without a digest",
        json_at(MANIFEST, "engines", 0, "engine", value="other.plan"),
        (VERIFY, BENCH, REBUILD, LOAD),
        "other.plan",
    ),
    *_each(
        "an engine without a digest",
        json_at(MANIFEST, "engines", 0, "engine", value="other.plan"),
        (ENGINE,),
        "the manifest has no sha256",
        1,
    ),
    # bundles
    Case(
        "a changed model, verify",
        wrote("run/deploy/model.onnx", "x"),
        VERIFY,
        1,
        "not what the manifest says",
        "FAILED model.onnx: sha256 is",
    ),
    *_each("a changed model", wrote("run/deploy/model.onnx", "x"), (BENCH, REBUILD, LOAD), "manifest says"),
    *_each("a changed model", wrote("run/deploy/model.onnx", "x"), (ENGINE,), "is not opened", 1),
    Case(
        "a missing model, verify",
        _removed("run/deploy/model.onnx"),
        VERIFY,
        1,
        "not what the manifest says",
        "FAILED model.onnx: is missing",
    ),
    *_each("a missing model", _removed("run/deploy/model.onnx"), (BENCH, REBUILD, LOAD), "missing"),
    *_each("a missing model", _removed("run/deploy/model.onnx"), (ENGINE,), "cannot be read", 1),
    Case(
        "a link out of a bundle, verify",
        _out("model.onnx"),
        VERIFY,
        1,
        "not what the manifest says",
        "FAILED model.onnx: is a link out of the bundle",
    ),
    *_each("a link out of a bundle", _out("model.onnx"), (BENCH, REBUILD, LOAD), "link out of the bundle"),
    *_each("a link out of a bundle", _out("model.onnx"), (ENGINE,), "outside the bundle", 1),
    *_each("changed weights", wrote("run/deploy/model.safetensors", "x"), (REBUILD, LOAD), "manifest says"),
    *_each("a changed plan", wrote(PLAN, "{}"), (REBUILD, LOAD, LANDSCAPE), "plan.json"),
    *_each("an engine of rubbish", listed("model.onnx", "rubbish"), (BENCH, REBUILD, ENGINE), "", 4),
    *_each("weights of rubbish", listed("model.safetensors", "rubbish"), (LOAD,), "model.safetensors"),
    *_each("a plan of rubbish", listed("plan.json", "rubbish"), (LOAD,), "plan.json"),
    *_each("a plan of a list", listed("plan.json", "[]"), (LOAD,), "plan.json"),
    *_each("a plan for another network", _plan("model", "name", value="zoo:resnet20_cifar"), (LOAD,), "fit"),
    *_each("a plan that drops what is not there", _plan("plan", "drop_blocks", value=["x"]), (LOAD,), "x"),
    *_each(
        "a plan of an image of nothing", _plan("input_shape", value=[3, 0, 16]), (LOAD,), "cannot be meant"
    ),
    *_each("a plan with code beside it", _hostile, (LOAD,), "search_folder"),
    *_each("a plan from wherever one is", _plan("search_folder", value="."), (LOAD,), "search_folder"),
    *_each("a run without a recipe", _removed("run/recipe.toml"), (LANDSCAPE,), "no recipe.toml"),
    *_each("a run without its inputs", nothing, (LANDSCAPE,), "inputs.json"),
    *_each(
        "a bundle in a new folder that is there",
        nothing,
        ((*REBUILD, "--out", "photos"),),
        "is there already",
    ),
    *_each(
        "an engine that no bundle is of", nothing, ((*REBUILD, "--backend", "fastest"),), "a bundle is of one"
    ),
    # images for an engine
    *(
        Case(f"{what}, run_engine", _image(content, name), (*ENGINE, name), 2, says)
        for what, name, content, says in (
            ("an image that is none", "x.png", b"an image", "no image that can be read"),
            ("half an image", "x.png", encoded("JPEG")[:99], "no image that can be read"),
            ("a bomb of 4 * 10^18 pixels", "x.png", png(2**31 - 1, 2**31 - 1), "no image that can be read"),
            (
                "a program for a printer",
                "x.png",
                b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
                "no image",
            ),
            ("an array of 10^15 bytes", "x.npy", npy("(100000, 100000, 100000, 1)"), "no image"),
            ("an array of 10^30 bytes", "x.npy", npy(f"({10**30}, 1, 1, 3)"), "no image"),
            ("an array of objects", "x.npy", npy("(1,)", b"\x80\x04K\x01.", "|O"), "no image"),
            ("an array of no images", "x.npy", npy("(0, 16, 16, 3)"), "images are uint8"),
            ("an array of floats", "x.npy", npy("(1,)", bytes(4), "<f4"), "images are uint8"),
            ("an archive that is none", "x.npz", b"PK\3\4", "no image"),
        )
    ),
    Case("an image that is not there, run_engine", nothing, (*ENGINE, "nowhere.png"), 2, "no image"),
    Case("a precision that is not there, run_engine", nothing, (*ENGINE, "--precision", "int8"), 2, "int8"),
    Case("an ensemble that is not there, run_engine", nothing, (*ENGINE, "--uncertainty"), 2, "uncertainty"),
)
