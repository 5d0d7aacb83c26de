"""The command line as a user meets it: what it prints where, and its exit codes."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import tomllib
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from conftest import Call, WriteOnnx, make_report

from optpipe import __version__, bench, cli
from optpipe.data import Preprocess
from optpipe.deploy import BundledEngine, Origin, Saved, write_bundle
from optpipe.errors import GateError, MissingError, OptpipeError, RunError, UsageError
from optpipe.models import ModelSpec
from optpipe.report import build
from optpipe.types import Fingerprint, Plan, Target

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    """The folder of a finished run: a report that saves 25% for one point, without a bundle."""
    folder = tmp_path / "run"
    build.write(folder, make_report())
    return folder


@pytest.fixture
def bundled(finished: Path, write_onnx: WriteOnnx) -> Path:
    """A finished run with a bundle, whose ONNX runs."""
    from torch import nn

    folder = finished / "deploy"
    folder.mkdir()
    write_onnx("model.onnx", size=16).rename(folder / "model.onnx")
    target = Target("onnxruntime", 4, (3, 16, 16), threads=1)
    saved = Saved(
        ModelSpec("zoo:resnet20_cifar"), "/", Plan(), (3, 16, 16), Preprocess((0.5,) * 3, (0.5,) * 3)
    )
    origin = Origin(Fingerprint("a processor", "an OS", (), 1), "0" * 64, 0, ())
    engine = BundledEngine("fp32", "onnxruntime", "model.onnx", "model.onnx", 0.1)
    write_bundle(folder, nn.Linear(2, 2), saved, target, origin, [engine])
    return finished


GATE = ("--max-accuracy-drop", 1, "--min-latency-reduction", 20)
QUICK = ("--duration", 0.1, "--warmUp", 10, "--threads", 1)

# ---------------------------------------------------------------- exit codes


def test_what_went_well_exits_0_with_its_result_on_stdout_alone(optpipe: Call, finished: Path) -> None:
    code, out, err = optpipe("gate", finished, *GATE)
    assert (code, err) == (0, "")
    assert out == (
        "PASSED accuracy: top1 drop 1.00 points (-0.68 to 2.68), at most 1 point allowed; "
        "the interval reaches beyond that\n"
        "PASSED latency: latency reduction 25.00% (24.00 to 26.00), at least 20% asked\n"
    )


def test_a_gate_that_is_not_met_exits_1(optpipe: Call, finished: Path) -> None:
    code, out, err = optpipe("gate", finished, "--min-agreement", 98.5, "--min-latency-reduction", 30)
    assert (code, err) == (1, f"Error: {finished}: agreement and latency not met\n")
    assert out == (
        "FAILED agreement: agreement with the original 96.00% (94.00 to 98.00), at least 98.5% asked\n"
        "FAILED latency: latency reduction 25.00% (24.00 to 26.00), at least 30% asked\n"
    )


def test_a_recipe_that_is_wrong_exits_2(optpipe: Call, tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text("[modle]\n", encoding="utf-8")
    for command in ("run", "inspect"):
        code, out, err = optpipe(command, path)
        assert (code, out) == (2, "")
        assert err == f"Error: {path}: [modle]: unknown table; did you mean model?\n"


def test_a_path_that_is_missing_exits_2(optpipe: Call, tmp_path: Path) -> None:
    for words in (("gate", tmp_path / "x", *GATE), ("verify", tmp_path / "x"), ("bench", tmp_path / "x")):
        code, out, err = optpipe(*words)
        assert (code, out) == (2, "")
        assert err.startswith(f"Error: {tmp_path / 'x'}")
        assert err.count("\n") == 1


def test_a_missing_package_exits_3_and_says_how_to_get_it(
    optpipe: Call, write_onnx: WriteOnnx, monkeypatch: pytest.MonkeyPatch
) -> None:
    # None in sys.modules is what Python itself takes for "not installed".
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    code, out, err = optpipe("bench", write_onnx("a.onnx"), *QUICK)
    assert (code, out) == (3, "")
    assert err == "Error: the package onnxruntime is not installed: pip install 'optpipe[cpu]'\n"


def test_a_file_that_cannot_be_written_exits_4(optpipe: Call, finished: Path) -> None:
    path = finished / "report.json" / "junit.xml"
    code, _, err = optpipe("gate", finished, *GATE, "--junit", path)
    assert code == 4
    assert err.startswith(f"Error: {path}: cannot be written: ")
    assert err.count("\n") == 1


def test_an_engine_that_cannot_run_exits_4(optpipe: Call, write_onnx: WriteOnnx) -> None:
    from onnx import load, save

    path = write_onnx("a.onnx")
    model = load(path)
    model.graph.node[0].op_type = "Convolution"
    save(model, path)
    code, out, err = optpipe("bench", path, *QUICK)
    assert (code, out) == (4, "")
    assert err.startswith("Error: ")
    assert "Convolution" in err
    assert err.count("\n") == 1


def test_an_interrupt_exits_130(write_onnx: WriteOnnx) -> None:
    words = ["bench", str(write_onnx("a.onnx")), "--duration", "60", "--threads", "1"]
    with subprocess.Popen(
        # Python ignores an interrupt whose signal its parent ignored, as shells do for what runs behind them.
        [sys.executable, "-c", STARTED, *words],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stderr is not None
        assert process.stderr.readline() == "measuring\n"
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, "")
    assert err.strip() == f"Interrupted; `optpipe {' '.join(words)}` begins anew"


STARTED = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from optpipe import cli, timing
measure = timing.single
def announced(*arguments, **options):
    print("measuring", file=sys.stderr, flush=True)
    return measure(*arguments, **options)
timing.single = announced
cli.main(sys.argv[1:])
"""


@pytest.mark.parametrize(
    ("error", "code"),
    [(OptpipeError, 4), (GateError, 1), (UsageError, 2), (MissingError, 3), (RunError, 4)],
)
def test_each_kind_of_error_has_its_exit_code(error: type[OptpipeError], code: int) -> None:
    assert error.exit_code == code
    assert f"{code} " in (cli.cli.help or "")


# ---------------------------------------------------------------- errors


def test_a_traceback_is_shown_under_debug_alone(optpipe: Call, tmp_path: Path) -> None:
    _, _, short = optpipe("verify", tmp_path)
    _, _, long = optpipe("verify", tmp_path, "--debug")
    assert "Traceback" not in short
    assert short.count("\n") == 1
    assert long.startswith("Traceback")
    assert long.endswith(short)


def test_an_error_that_nobody_foresaw_is_one_line_too(
    optpipe: Call, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(run: Path) -> None:
        raise ZeroDivisionError(f"a\nb {run.name}")

    monkeypatch.setattr(build, "read", broken)
    code, _, err = optpipe("gate", finished, *GATE)
    assert code == 4
    assert err == "Error: unexpected ZeroDivisionError: a b run (--debug shows where)\n"
    assert "Traceback" in optpipe("gate", finished, *GATE, "--debug")[2]


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        RuntimeError("Resource temporarily unavailable"),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory"
        ),
        RuntimeError("could not create a primitive"),
        RuntimeError("[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : bad allocation"),
    ],
    ids=["python", "system", "thread", "torch", "onednn", "onnxruntime"],
)
def test_memory_that_is_not_there_is_one_line(
    error: Exception, optpipe: Call, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(run: Path) -> None:
        raise error

    monkeypatch.setattr(build, "read", refused)
    code, _, err = optpipe("gate", finished, *GATE)
    assert (code, err) == (4, "Error: this takes more memory than there is; --debug shows where\n")


def test_an_error_of_the_system_names_the_file(optpipe: Call, finished: Path) -> None:
    (finished / "report.json").unlink()
    (finished / "report.json").mkdir()
    code, _, err = optpipe("gate", finished, *GATE)
    assert (code, err) == (4, f"Error: {finished}/report.json: Is a directory\n")


def test_an_unknown_command_names_the_nearest(optpipe: Call) -> None:
    code, out, err = optpipe("inspekt", "recipe.toml")
    assert (code, out) == (2, "")
    assert "No such command 'inspekt'" in err
    assert err.count("Did you mean") == 1
    assert "inspect" in err


def test_an_unknown_command_near_to_none_names_none(optpipe: Call) -> None:
    code, _, err = optpipe("zzz")
    assert code == 2
    assert "Did you mean" not in err


def test_an_unknown_option_names_the_nearest(optpipe: Call) -> None:
    code, _, err = optpipe("run", "recipe.toml", "--fersh")
    assert code == 2
    assert "--fersh" in err
    assert "--fresh" in err


@pytest.mark.parametrize(
    "words",
    [("run",), ("gate",), ("bench", "a.onnx", "--batch", "0"), ("bench", "a.onnx", "--duration", "x")],
)
def test_bad_arguments_exit_2(optpipe: Call, words: tuple[str, ...]) -> None:
    code, out, err = optpipe(*words)
    assert (code, out) == (2, "")
    assert err.startswith("Usage: optpipe ")


def test_no_command_shows_what_there_is(optpipe: Call) -> None:
    code, out, err = optpipe()
    assert code == 2
    for command in (
        "init",
        "run",
        "inspect",
        "bench",
        "gate",
        "compare",
        "report",
        "verify",
        "rebuild",
        "landscape",
        "doctor",
    ):
        assert f"  {command} " in out + err


def test_the_version_is_that_of_the_package(optpipe: Call) -> None:
    assert optpipe("--version") == (0, f"optpipe, version {__version__}\n", "")


def test_a_reader_that_goes_away_shows_no_traceback(finished: Path) -> None:
    command = f"'{sys.executable}' -m optpipe.cli gate '{finished}' --max-accuracy-drop 1"
    done = subprocess.run(
        ["bash", "-c", f"({command} --min-latency-reduction 20; echo $? >&2) | true"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr in ("0\n", "1\n"), "the pipe may be closed before or after the two lines are written"


# ---------------------------------------------------------------- gate and verify


@pytest.mark.parametrize(("reduction", "code", "failures"), [(20, 0, "0"), (30, 1, "1")])
def test_junit_is_written_whether_or_not_the_gate_is_met(
    optpipe: Call, finished: Path, reduction: int, code: int, failures: str
) -> None:
    path = finished / "checks" / "junit.xml"
    found, _, _ = optpipe(
        "gate", finished, "--max-accuracy-drop", 1, "--min-latency-reduction", reduction, "--junit", path
    )
    assert found == code
    assert ElementTree.parse(path).getroot().get("failures") == failures


def test_a_bundle_verifies_until_a_byte_is_flipped(optpipe: Call, bundled: Path) -> None:
    assert optpipe("verify", bundled) == (0, "PASSED every file is as the manifest says\n", "")
    path = bundled / "deploy" / "model.onnx"
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)
    code, out, err = optpipe("verify", bundled)
    assert (code, err) == (1, f"Error: {bundled}: files that are not what the manifest says: 1\n")
    assert out.startswith("FAILED model.onnx: sha256 is ")


# ---------------------------------------------------------------- bench


def test_bench_prints_the_figures_as_trtexec_names_them(optpipe: Call, write_onnx: WriteOnnx) -> None:
    path = write_onnx("a.onnx")
    code, out, err = optpipe("bench", path, *QUICK, "--batch", 2)
    assert (code, err) == (0, "")
    head, throughput, latency, samples = out.splitlines()
    assert head.startswith(f"=== {path} (onnxruntime, batch 2, ")
    assert throughput.startswith("Throughput: ")
    assert latency.startswith("Latency: min = ")
    for figure in ("max = ", "mean = ", "median = ", "percentile(99%) = "):
        assert figure in latency
    assert samples.startswith("Samples: ")


def test_bench_json_agrees_with_itself(optpipe: Call, write_onnx: WriteOnnx) -> None:
    _, out, _ = optpipe("bench", write_onnx("a.onnx"), *QUICK, "--batch", 2, "--json")
    timed = json.loads(out)["model"]
    assert timed["target"]["batch"] == 2
    assert timed["target"]["input_shape"] == [3, 16, 16]
    latency = timed["latency"]
    assert 0 < latency["min_ms"] <= latency["median_ms"] <= latency["p99_ms"] <= latency["max_ms"]
    assert timed["throughput_qps"] == pytest.approx(1000 / latency["mean_ms"])
    assert timed["images_per_s"] == pytest.approx(2 * timed["throughput_qps"])
    assert latency["ratio_to_original"] is None


def test_bench_vs_gives_the_ratio_of_two_networks(optpipe: Call, write_onnx: WriteOnnx) -> None:
    small, large = write_onnx("small.onnx"), write_onnx("large.onnx", layers=8)
    code, out, _ = optpipe("bench", small, "--vs", large, *QUICK, "--batch", 8, "--json")
    assert code == 0
    both = json.loads(out)
    latency = both["model"]["latency"]
    low, high = latency["ratio_ci95"]
    assert low <= latency["ratio_to_original"] <= high < 0.7
    assert both["other"]["latency"]["median_ms"] > both["model"]["latency"]["median_ms"]
    _, text, _ = optpipe("bench", small, "--vs", large, *QUICK)
    assert text.splitlines()[-1].startswith(f"Ratio {small} / {large}: 0.")


def test_bench_takes_a_run_with_its_own_target(optpipe: Call, bundled: Path, write_onnx: WriteOnnx) -> None:
    other = write_onnx("other.onnx", layers=2)
    code, out, _ = optpipe("bench", bundled, "--vs", other, "--duration", 0.1, "--json")
    assert code == 0
    assert json.loads(out)["model"]["target"]["batch"] == 4
    assert json.loads(out)["other"]["target"]["batch"] == 4
    _, out, _ = optpipe("bench", bundled / "deploy", *QUICK, "--batch", 2, "--json")
    assert json.loads(out)["model"]["target"]["batch"] == 2


def test_bench_with_the_runs_own_backend_keeps_its_precision_and_options(bundled: Path) -> None:
    path = bundled / "deploy" / "manifest.json"
    manifest = json.loads(path.read_text(encoding="utf-8"))
    manifest["target"]["precision"] = "int8"
    manifest["engines"][0]["source"] = "model.int8.onnx"
    manifest["files"]["model.int8.onnx"] = manifest["files"]["model.onnx"]
    shutil.copyfile(bundled / "deploy" / "model.onnx", bundled / "deploy" / "model.int8.onnx")
    path.write_text(json.dumps(manifest), encoding="utf-8")
    found = [bench._locate(bundled, None, None, name, gpu=False) for name in (None, "onnxruntime", "auto")]
    assert [(source.name, target.precision) for source, target in found] == [
        ("model.int8.onnx", "int8"),
        ("model.int8.onnx", "int8"),
        ("model.onnx", "fp32"),
    ]


def test_bench_refuses_a_file_that_the_manifest_does_not_list(optpipe: Call, bundled: Path) -> None:
    path = bundled / "deploy" / "model.onnx"
    path.write_bytes(path.read_bytes() + b"x")
    code, _, err = optpipe("bench", bundled, *QUICK)
    assert (code, err) == (
        2,
        f"Error: {path}: is missing or not what the manifest says; get the bundle anew\n",
    )


def test_bench_times_one_engine_and_seeks_no_fastest(optpipe: Call, write_onnx: WriteOnnx) -> None:
    code, _, err = optpipe("bench", write_onnx("a.onnx"), *QUICK, "--backend", "fastest")
    assert (code, "one engine is timed here; name a backend" in err) == (2, True)


def test_bench_takes_the_batch_that_a_file_is_fixed_to(optpipe: Call, write_onnx: WriteOnnx) -> None:
    path = write_onnx("fixed.onnx", batch=3)
    _, out, _ = optpipe("bench", path, *QUICK, "--json")
    assert json.loads(out)["model"]["target"]["batch"] == 3
    code, _, err = optpipe("bench", path, *QUICK, "--batch", 4)
    assert (code, err) == (2, f"Error: {path}: takes batches of 3 only, not 4\n")


def test_bench_times_networks_of_different_resolutions(optpipe: Call, write_onnx: WriteOnnx) -> None:
    a, b = write_onnx("a.onnx", size=16), write_onnx("b.onnx", size=8)
    code, out, _ = optpipe("bench", a, "--vs", b, *QUICK, "--json")
    found = json.loads(out)
    shapes = [found[name]["target"]["input_shape"] for name in ("model", "other")]
    assert (code, shapes) == (0, [[3, 16, 16], [3, 8, 8]])
    assert found["model"]["latency"]["ratio_to_original"] > 0


def test_bench_refuses_networks_of_different_channels(optpipe: Call, write_onnx: WriteOnnx) -> None:
    import onnx

    a, b = write_onnx("a.onnx"), write_onnx("b.onnx")
    model = onnx.load(b)
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 1
    onnx.save(model, b)
    code, _, err = optpipe("bench", a, "--vs", b, *QUICK)
    assert (code, err) == (
        2,
        f"Error: {b}: takes (1, 16, 16), {a} (3, 16, 16): not comparable\n",
    )


@pytest.mark.parametrize("content", [b"", b"not a model", b"\x08"])
def test_bench_refuses_what_is_no_onnx(optpipe: Call, tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.onnx"
    path.write_bytes(content)
    code, _, err = optpipe("bench", path)
    assert code == 2
    assert err.startswith(f"Error: {path}: is no ONNX model: ")
    assert err.count("\n") == 1


def test_bench_refuses_inputs_that_are_no_images(optpipe: Call, write_onnx: WriteOnnx) -> None:
    from onnx import load, save

    path = write_onnx("a.onnx")
    model = load(path)
    model.graph.input[0].type.tensor_type.shape.dim[2].dim_param = "height"
    save(model, path)
    code, _, err = optpipe("bench", path)
    assert code == 2
    assert err == (
        f"Error: {path}: its first input is [0, 3, 0, 16]; images (N, C, H, W) of a fixed size are needed\n"
    )


# ---------------------------------------------------------------- doctor


def test_doctor_lists_packages_backends_and_the_device(optpipe: Call) -> None:
    code, out, err = optpipe("doctor")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert all(line.startswith(("ok      ", "missing ")) for line in lines)
    subjects = [line[8:].partition(":")[0] for line in lines]
    for subject in ("python", "torch", "onnxruntime", "gpu", "backend onnxruntime", "disk", "cores"):
        assert subject in subjects


def test_doctor_says_how_to_get_what_is_missing(optpipe: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    _, out, _ = optpipe("doctor")
    assert (
        "missing backend onnxruntime: cannot run; "
        "the package onnxruntime is not installed: pip install 'optpipe[cpu]'"
    ) in out.splitlines()


# ---------------------------------------------------------------- run and inspect


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A small recipe that is fine, with images of noise."""
    rng = np.random.default_rng(0)
    for name in ("few", "many"):
        images = rng.integers(0, 256, (12, 16, 16, 3), dtype=np.uint8)
        np.savez(tmp_path / f"{name}.npz", images=images, labels=rng.integers(0, 10, 12))
    path = tmp_path / "small.toml"
    path.write_text(
        '[model]\nname = "zoo:resnet20_cifar"\nclasses = 10\n'
        '[data]\ncalibration = { source = "few.npz" }\nevaluation = { source = "many.npz" }\n'
        "[data.preprocess]\nmean = [0.5, 0.5, 0.5]\nstd = [0.5, 0.5, 0.5]\n"
        '[method]\nname = "practise"\n[budget]\ndrop_blocks = 1\n',
        encoding="utf-8",
    )
    return path


def test_a_dry_run_prints_the_whole_recipe_and_writes_nothing(
    optpipe: Call, recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(recipe.parent)
    before = sorted(recipe.parent.iterdir())
    code, out, err = optpipe("run", "small.toml", "--dry-run", "--set", "run.seed=7")
    assert (code, err) == (0, "small.toml is fine; it would run in runs/small\n")
    frozen = tomllib.loads(out)
    assert frozen["budget"] == {"drop_blocks": 1}
    assert frozen["run"]["seed"] == 7
    assert frozen["target"]["backend"] == "onnxruntime"
    assert frozen["recover"]["steps"] > 0
    assert sorted(recipe.parent.iterdir()) == before


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "method.name=practice",
            '[method] name = "practice": there is no such method; did you mean practise?',
        ),
        (
            "target.backend=onnx",
            '[target] backend = "onnx": there is no such backend; did you mean onnxruntime?',
        ),
        ("recover.step=3", "[recover] step = 3: unknown key; did you mean steps?"),
        ("method.scorrer=fast", '[method] scorrer = "fast": unknown key; did you mean scorer?'),
        ("data.evaluation.source=few.npz", "12 evaluation images are also calibration images"),
    ],
)
def test_a_recipe_that_does_not_fit_together_is_refused_before_anything_is_written(
    optpipe: Call, recipe: Path, override: str, message: str
) -> None:
    folder = recipe.parent / "out"
    code, out, err = optpipe("run", recipe, "--out", folder, "--set", override)
    assert (code, out) == (2, "")
    assert message in err
    assert err.startswith("Error: ")
    assert err.count("\n") == 1
    assert not folder.exists()


def test_a_folder_of_other_files_is_refused_and_left_alone(optpipe: Call, recipe: Path) -> None:
    folder = recipe.parent / "photos"
    folder.mkdir()
    (folder / "holiday.jpg").write_text("sea", encoding="utf-8")
    code, out, err = optpipe("run", recipe, "--out", folder, "--fresh")
    assert (code, out) == (2, "")
    assert err == f"Error: {folder}: holds files that are no optpipe run; name another folder with --out\n"
    assert [path.name for path in folder.iterdir()] == ["holiday.jpg"]


def test_inspect_lists_blocks_and_groups(optpipe: Call, recipe: Path) -> None:
    code, out, err = optpipe("inspect", recipe)
    assert (code, err) == (0, "")
    total, _, head, *lines = out.splitlines()
    assert total.startswith("input 3x16x16, 10 classes, ")
    assert total.endswith(" blocks droppable")
    assert head.split() == ["block", "kind", "input", "output", "parameters", "MACs", "droppable"]
    assert any(line.startswith("layer1.1 ") and line.endswith(" yes") for line in lines)
    assert any("no: " in line for line in lines)
    assert any(line.startswith("channel group ") for line in lines)


def test_inspect_json_says_the_same(optpipe: Call, recipe: Path) -> None:
    _, out, _ = optpipe("inspect", recipe, "--json", "--set", "data.preprocess.size=[32, 32]")
    shown = json.loads(out)
    assert shown["input_shape"] == [3, 32, 32]
    assert shown["classes"] == 10
    assert len(shown["blocks"]) == 9
    assert all(block["droppable"] or block["why_not"] for block in shown["blocks"])
