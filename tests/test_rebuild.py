"""A bundle's engines built anew: what is built, what is refused, and what a failure leaves behind."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import nn

from optpipe import deploy, onnx_export, plugins, precision, rebuild, selection
from optpipe.backends import onnxruntime as cpu
from optpipe.cli import main
from optpipe.data import DataSpec, Preprocess, load_images
from optpipe.deploy import bundle as bundles
from optpipe.errors import MissingError, RunError, UsageError
from optpipe.models import ModelSpec
from optpipe.types import Engine, Event, Fingerprint, Plan, Precision, Session, Target

SHAPE = (3, 16, 16)
PREPROCESS = Preprocess((0.5,) * 3, (0.25,) * 3)
TARGET = Target("onnxruntime", 4, SHAPE, threads=1)
ORIGIN = deploy.Origin(Fingerprint("another machine", "Linux", (), 2), "0" * 64, 0, ("a.png",))


@pytest.fixture(scope="module")
def shipped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of onnxruntime engines in fp32 and int8, as a run leaves it."""
    folder = tmp_path_factory.mktemp("shipped") / "run" / "deploy"
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)
    ).eval()
    onnx_export.export(network, SHAPE, 4, folder / "model.onnx")
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 16, 3), dtype=np.uint8)
    np.savez(folder.parent / "images.npz", images=pixels)
    images = load_images(DataSpec(str(folder.parent / "images.npz")), PREPROCESS, 3)
    settings = precision.Settings(range_methods=("minmax",))
    precision.convert(folder / "model.onnx", folder / "model.int8.onnx", "int8", images, settings)
    saved = deploy.Saved(ModelSpec("somewhere:network", classes=5), ".", Plan(), SHAPE, PREPROCESS)
    engines = [
        deploy.BundledEngine("fp32", "onnxruntime", "model.onnx", "model.onnx", 0.0),
        deploy.BundledEngine("int8", "onnxruntime", "model.int8.onnx", "model.int8.onnx", 0.0, ("head",)),
    ]
    deploy.write_bundle(folder, network, saved, TARGET, ORIGIN, engines)
    return folder.parent


@pytest.fixture
def run(shipped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "locks").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "locks"))  # others may be measuring meanwhile
    shutil.copytree(shipped, tmp_path / "run")
    return tmp_path / "run"


def ignore(event: Event) -> None:
    """Nobody listens."""


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def other_backend(
    monkeypatch: pytest.MonkeyPatch,
    *,
    device: str = "cuda",
    offers: Sequence[Precision] = ("fp32", "fp16", "int8"),
    source: str = "onnx",
    fails: Sequence[Precision] = (),
    wrong: Sequence[Precision] = (),
) -> None:
    """A backend "other" that writes plans and runs them with ONNX Runtime; of a GPU that is not there."""

    def build(path: Path, target: Target, folder: Path) -> Engine:
        if target.precision in fails:
            raise RunError("the builder gave up")
        folder.mkdir(parents=True)
        content = path.read_bytes()
        (folder / "engine.plan").write_bytes(content)
        (folder.parents[1] / "cache").write_bytes(b"timings")
        built = cpu.build(folder / "engine.plan", TARGET, folder)
        return replace(built, build_s=1.5, timing_cache=folder.parents[1] / "cache", notes=("built",))

    def load(engine: Engine, target: Target) -> Session:
        session = cpu.load(engine, TARGET)
        if target.precision not in wrong:
            return session
        off: Any = SimpleNamespace(run=lambda images: session.run(images) * np.nan, close=session.close)
        return cast(Session, off)

    module = ModuleType("other")
    members = {
        "SOURCE": source,
        "precisions": lambda where: tuple(offers) if where == device else (),
        "missing": lambda target: None,
        "fingerprint": lambda target: Fingerprint("this machine", "580", (), 1),
        "build": build,
        "load": load,
    }
    vars(module).update(members)
    found = plugins.backend
    monkeypatch.setattr(plugins, "backend", lambda name: module if name == "other" else found(name))
    monkeypatch.setitem(selection.ORDER, "cuda", ("other",))


def test_the_same_engines_are_built_on_this_machine(run: Path) -> None:
    before = bundles.open_bundle(run)[1]
    rebuilt = rebuild.rebuild(run, gpu=False, emit=ignore)
    after = bundles.open_bundle(run)[1]
    assert deploy.verify(run) == []
    assert after.engines == before.engines
    assert (after.target, after.origin, after.files) == (before.target, before.origin, before.files)
    assert before.built_on == ORIGIN.fingerprint
    assert after.built_on == cpu.fingerprint(TARGET)
    assert [engine.precision for engine in rebuilt.engines] == ["fp32", "int8"]
    fp32, int8 = rebuilt.engines
    assert fp32.compared is not None
    assert int8.compared is not None
    assert fp32.compared.max_abs == 0
    assert 0 < int8.compared.max_rel < 0.5
    assert fp32.latency is not None
    assert fp32.latency.samples >= 40


def test_a_bundle_moves_to_the_gpu_with_the_precisions_that_can_be_had(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other_backend(monkeypatch)
    events: list[Event] = []
    rebuilt = rebuild.rebuild(run, gpu=True, emit=events.append)
    manifest = bundles.open_bundle(run)[1]
    assert deploy.verify(run) == []
    assert manifest.target == replace(TARGET, backend="other", device="cuda")
    assert manifest.built_on.device == "this machine"
    engines = {entry.precision: (entry.engine, entry.source) for entry in manifest.engines}
    assert engines == {
        "fp32": ("engines/fp32/engine.plan", "model.onnx"),
        "fp16": ("engines/fp16/engine.plan", "model.fp16.onnx"),
        "int8": ("engines/int8/engine.plan", "model.int8.onnx"),
    }
    assert (run / "deploy" / "timing.cache").read_bytes() == b"timings"
    notes = {engine.precision: engine.notes for engine in rebuilt.engines}
    assert "made without images" in notes["fp16"][0]
    assert "chosen for onnxruntime" in notes["int8"][0]
    text = rebuild.as_text(rebuilt).splitlines()
    assert text[0] == f"{run / 'deploy'}: engines of other on cuda"
    assert text[1].startswith("fp32: Latency ")
    assert ", built in 1.5 s, logits within 0 of the largest" in text[1]


def test_an_engine_of_another_precision_that_fails_or_is_wrong_is_left_out(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other_backend(monkeypatch, fails=("fp16",), wrong=("int8",))
    events: list[Event] = []
    rebuilt = rebuild.rebuild(run, gpu=True, emit=events.append)
    manifest = bundles.open_bundle(run)[1]
    assert [entry.precision for entry in manifest.engines] == ["fp32"]
    assert [name for name in manifest.files if name.endswith(".plan")] == ["engines/fp32/engine.plan"]
    assert deploy.verify(run) == []
    failed = {engine.precision: engine.failed for engine in rebuilt.engines}
    assert failed["fp16"] == "the builder gave up"
    assert failed["int8"].startswith("the int8 engine differs from ONNX Runtime in fp32 by up to nan")
    assert [event.name for event in events if event.kind == "warning"] == ["rebuild", "rebuild"]


@pytest.mark.parametrize("fault", ["fails", "wrong"])
def test_a_rebuild_that_fails_leaves_the_old_bundle_as_it_was(
    run: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    before = content(run)
    if fault == "fails":
        other_backend(monkeypatch, fails=("fp32",))
    else:
        other_backend(monkeypatch, wrong=("fp32",))
    with pytest.raises(RunError):
        rebuild.rebuild(run, gpu=True, emit=ignore)
    assert content(run) == before
    assert sorted(path.name for path in run.iterdir()) == ["deploy", "images.npz"]


def test_with_out_the_old_bundle_stays_and_a_used_folder_is_refused(run: Path, tmp_path: Path) -> None:
    before = content(run)
    rebuilt = rebuild.rebuild(run, gpu=False, out=tmp_path / "new", emit=ignore)
    assert rebuilt.folder == tmp_path / "new"
    assert content(run) == before
    assert deploy.verify(tmp_path / "new") == []
    with pytest.raises(UsageError, match="is there already"):
        rebuild.rebuild(run, gpu=False, out=tmp_path / "new", emit=ignore)


def test_engines_may_be_changed_or_gone_but_nothing_else(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other_backend(monkeypatch)
    rebuild.rebuild(run, gpu=True, emit=ignore)
    (run / "deploy" / "engines" / "fp32" / "engine.plan").write_bytes(b"changed")
    (run / "deploy" / "engines" / "fp16" / "engine.plan").unlink()
    rebuild.rebuild(run, gpu=True, emit=ignore)
    assert deploy.verify(run) == []
    with (run / "deploy" / "model.fp16.onnx").open("ab") as file:
        file.write(b"x")
    with pytest.raises(UsageError, match=r"model\.fp16\.onnx: sha256 is .*what is changed is not built from"):
        rebuild.rebuild(run, gpu=True, emit=ignore)


def test_an_onnx_file_that_is_itself_the_engine_must_be_the_manifests(run: Path) -> None:
    with (run / "deploy" / "model.onnx").open("ab") as file:
        file.write(b"x")
    with pytest.raises(UsageError, match=r"model\.onnx: sha256 is "):
        rebuild.rebuild(run, gpu=False, emit=ignore)


def test_a_manifest_that_points_outside_the_bundle_is_refused(run: Path) -> None:
    path = run / "deploy" / "manifest.json"
    manifest = json.loads(path.read_text(encoding="utf-8"))
    manifest["files"]["../../outside"] = manifest["files"]["model.onnx"]
    path.write_text(json.dumps(manifest), encoding="utf-8")
    with pytest.raises(UsageError, match=r"lists \.\./\.\./outside, which lies outside the bundle"):
        rebuild.rebuild(run, gpu=False, emit=ignore)


def test_a_program_that_the_bundle_lacks_is_named_with_what_to_do(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other_backend(monkeypatch, source="program")
    with pytest.raises(UsageError) as error:
        rebuild.rebuild(run, gpu=True, emit=ignore)
    assert str(error.value) == (
        "the bundle has no model.program.pt2, which other builds from: name another --backend or run the "
        'recipe on this machine with target.backend = "other"'
    )


def test_a_precision_that_the_new_backend_lacks_gives_way_to_fp32(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = run / "deploy" / "manifest.json"
    manifest = json.loads(path.read_text(encoding="utf-8"))
    manifest["target"]["precision"] = "int8"
    path.write_text(json.dumps(manifest), encoding="utf-8")
    other_backend(monkeypatch, offers=("fp32", "fp16"))
    rebuilt = rebuild.rebuild(run, gpu=True, emit=ignore)
    assert rebuilt.target.precision == "fp32"
    assert rebuilt.note.endswith("other does not run int8 on cuda, so the target is fp32")


def test_what_this_machine_lacks_is_said_and_nothing_is_touched(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = content(run)
    monkeypatch.setattr(cpu, "missing", lambda target: "no engine today")
    with pytest.raises(MissingError, match="no engine today"):
        rebuild.rebuild(run, gpu=False, emit=ignore)
    assert content(run) == before


def test_openvino_takes_over_a_bundle_by_its_name(run: Path) -> None:
    pytest.importorskip("openvino", reason="the package openvino is not installed")
    rebuilt = rebuild.rebuild(run, gpu=False, backend="openvino", emit=ignore)
    assert {"fp32", "int8"} <= {engine.precision for engine in rebuilt.engines if not engine.failed}
    manifest = bundles.open_bundle(run)[1]
    assert {entry.backend for entry in manifest.engines} == {"openvino"}
    assert deploy.verify(run) == []


def test_the_command_prints_a_line_for_each_engine(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["rebuild", str(run), "--out", str(run.parent / "new")])
    head, fp32, int8 = capsys.readouterr().out.splitlines()
    assert head == f"{run.parent / 'new'}: engines of onnxruntime on cpu"
    assert fp32.startswith("fp32: Latency ")
    assert fp32.endswith(", the same class for 100% of 32 random images")
    assert int8.startswith("int8: Latency ")
