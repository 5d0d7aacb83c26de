"""The tensorrt backend against the real bindings of TensorRT 10 and 11.

The bindings are installed by pip into a cache folder, without TensorRT's libraries; a library that answers
nothing stands in for those. That is enough to import the real module and to read what it offers.
"""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path

import pytest
from conftest import WriteOnnx
from fake_tensorrt import RELEASES, Use, load_api
from fake_tensorrt_runtime import Machine
from tensorrt_signatures import CLASSES, ENUMS, absent
from wheels import folder_with

from optpipe import backends
from optpipe.backends import tensorrt as backend
from optpipe.errors import RunError
from optpipe.types import Target

HERE = Path(__file__).parent
SOURCES = sorted(Path(backends.__path__[0]).glob("*tensorrt*.py"))
WHEELS = {"10": "tensorrt-cu12-bindings==10.16.1.11", "11": "tensorrt-cu13-bindings==11.4.0.106"}
LIBRARIES = ("libnvinfer", "libnvinfer_plugin", "libnvonnxparser")
OBJECTS = {
    "builder": "Builder",
    "network": "INetworkDefinition",
    "parser": "OnnxParser",
    "problem": "ParserError",
    "config": "IBuilderConfig",
    "self._config": "IBuilderConfig",
    "profile": "IOptimizationProfile",
    "images": "ITensor",
    "self._engine": "ICudaEngine",
    "self._context": "IExecutionContext",
    "self._runtime": "Runtime",
    "inspector": "EngineInspector",
    "self._severity": "ILogger.Severity",
}
"""What the sources call an object of TensorRT."""
OWN_OBJECTS = {"_tensorrt_cache.py": {"cache": "ITimingCache", "other": "ITimingCache"}}

Ask = Callable[..., str]


@pytest.fixture(scope="module", params=RELEASES)
def release(request: pytest.FixtureRequest) -> str:
    found: str = request.param
    return found


@pytest.fixture(scope="module")
def ask(release: str, tmp_path_factory: pytest.TempPathFactory) -> Ask:
    """Run tensorrt_signatures.py on the real module."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        pytest.skip("no C compiler (cc, gcc or clang) for the library that stands in for TensorRT's")
    folder = folder_with(WHEELS[release])
    libraries = tmp_path_factory.mktemp("libraries")
    for name in LIBRARIES:
        path = libraries / f"{name}.so.{release}"
        source = HERE / "tensorrt_api" / "stand_in.c"
        subprocess.run([compiler, "-shared", "-fPIC", "-o", str(path), str(source)], check=True)
    environment = {**os.environ, "LD_LIBRARY_PATH": str(libraries), "PYTHONPATH": str(folder)}

    def run(*arguments: str) -> str:
        command = [sys.executable, str(HERE / "tensorrt_signatures.py"), *arguments]
        result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        assert result.returncode == 0, result.stderr
        return result.stdout

    return run


@pytest.fixture
def uses(release: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, write_onnx: WriteOnnx) -> set[Use]:
    """All that the backend uses of TensorRT, recorded while all of it runs on the stand-in."""
    machine = Machine(release)
    machine.install(monkeypatch)
    cache_file = tmp_path / "timings"
    options = {
        "optimization_level": "2",
        "workspace_mb": "64",
        "max_aux_streams": "1",
        "sparse_weights": "on",
        "timing_cache": str(cache_file),
    }
    target = Target("tensorrt", 2, (3, 16, 16), "fp32", "cuda", options=tuple(options.items()))
    onnx = write_onnx("model.onnx")
    machine.during_build = partial(cache_file.write_bytes, machine.cache("another process's"))
    engine = backend.build(onnx, target, tmp_path)
    backend.layers(engine, target)
    backend.layer_times(engine, target, 1)
    backend.fingerprint(target)
    machine.parser_errors = [("unsupported", "/conv")]
    with pytest.raises(RunError):
        backend.build(onnx, target, tmp_path)
    return machine.trt.uses


def test_the_committed_signatures_are_those_of_the_real_bindings(ask: Ask, release: str) -> None:
    assert json.loads(ask("dump")) == load_api(release)


def test_all_that_the_backend_uses_exists_in_the_real_bindings(
    ask: Ask, uses: set[Use], tmp_path: Path
) -> None:
    assert len(uses) > 50
    path = tmp_path / "uses.json"
    path.write_text(json.dumps([asdict(use) for use in uses]), encoding="utf-8")
    assert ask("check", str(path)).split() == []


@pytest.mark.parametrize(
    "wrong",
    [
        Use("Builder", "build_cuda_engine", "call", 1),
        Use("Builder", "create_network", "call", 2),
        Use("IBuilderConfig", "set_timing_cache", "call", 1, ("ignore",)),
        Use("IBuilderConfig", "max_workspace_size", "set"),
        Use("ICudaEngine", "num_bindings", "get"),
        Use("ICudaEngine", "num_io_tensors", "set"),
        Use("BuilderFlag", "NO_SUCH_FLAG", "member"),
        Use("Dims", "", "buffer"),
        Use("NoSuchClass", "__init__", "call"),
    ],
)
def test_a_use_that_does_not_exist_is_found(ask: Ask, tmp_path: Path, wrong: Use) -> None:
    path = tmp_path / "uses.json"
    path.write_text(json.dumps([asdict(wrong)]), encoding="utf-8")
    assert ask("check", str(path)).strip() == f"{wrong.owner}.{wrong.name} ({wrong.kind})"


def test_what_release_11_dropped_is_missing_there_and_only_there() -> None:
    dropped = [
        asdict(Use("BuilderFlag", "FP16", "member")),
        asdict(Use("Builder", "platform_has_tf32", "get")),
    ]
    assert absent(load_api("10"), dropped) == []
    assert len(absent(load_api("11"), dropped)) == 2


def test_every_name_of_tensorrt_in_the_sources_was_used_while_recording(uses: set[Use]) -> None:
    recorded = {(use.owner, use.name) for use in uses}
    written = {name for path in SOURCES for name in _written_in(path)}
    assert len(written) > 40
    assert written - recorded == set()


def test_a_name_in_the_sources_that_was_never_used_is_found(uses: set[Use], tmp_path: Path) -> None:
    source = tmp_path / "_tensorrt_more.py"
    source.write_text("config.builder_flags = 1 << trt.BuilderFlag.FP16\nself._engine.max_batch_size\n")
    recorded = {(use.owner, use.name) for use in uses}
    found = _written_in(source) - recorded
    assert found == {
        ("IBuilderConfig", "builder_flags"),
        ("BuilderFlag", "FP16"),
        ("ICudaEngine", "max_batch_size"),
    }


def _written_in(path: Path) -> set[tuple[str, str]]:
    """Class and attribute of every access to TensorRT in a source file."""
    objects = OBJECTS | OWN_OBJECTS.get(path.name, {})
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Attribute):
            continue
        root, name = ast.unparse(node.value), node.attr
        if root in objects:
            found.add((objects[root], name))
        elif root in ("trt", "self._trt"):
            found |= _of_module(name)
        elif (nested := root.removeprefix("self._").removeprefix("trt.")) in ENUMS:
            found.add((nested, name))
    return found


def _of_module(name: str) -> set[tuple[str, str]]:
    if name in CLASSES:
        return {(name, "__init__")}
    if name in ENUMS or name == "__version__":
        return set()
    return {("the module", name)}
