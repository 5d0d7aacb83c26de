from __future__ import annotations

import hashlib
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx as onnx_package
import pytest
import torch
from torch import nn

from optpipe.backends import onnxruntime as backend
from optpipe.backends._engine import engine_of
from optpipe.errors import RunError, UsageError
from optpipe.onnx_export import export
from optpipe.types import Target

SHAPE = (3, 8, 8)


@pytest.fixture(scope="module")
def onnx(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("onnx") / "model.onnx"
    export(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 3)), SHAPE, 2, path)
    return path


def test_importing_the_backend_imports_no_onnxruntime_and_no_torch() -> None:
    code = (
        "import sys, optpipe.backends.onnxruntime; print(sorted({'onnxruntime', 'torch'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_missing_package_is_named_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert (
        backend.missing(Target("onnxruntime", 1, SHAPE))
        == "the package onnxruntime is not installed: pip install 'optpipe[cpu]'"
    )


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (Target("onnxruntime", 1, SHAPE, precision="fp16"), r"target\.precision = 'fp16': .*fp32, int8"),
        (Target("onnxruntime", 1, SHAPE, device="tpu"), "target.device = 'tpu'"),
        (Target("onnxruntime", 0, SHAPE), "target.batch = 0"),
        (Target("onnxruntime", 1, SHAPE, threads=0), "target.threads = 0"),
    ],
)
def test_a_target_it_cannot_serve_is_a_usage_error(target: Target, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        backend.missing(target)


def test_the_engine_is_the_onnx_file_where_it_lies(onnx: Path, tmp_path: Path) -> None:
    engine = backend.build(onnx, Target("onnxruntime", 2, SHAPE), tmp_path / "folder")
    assert engine.path == onnx
    assert engine.sha256 == hashlib.sha256(onnx.read_bytes()).hexdigest()
    assert not (tmp_path / "folder").exists()


def test_a_target_it_cannot_serve_is_neither_built_nor_loaded(onnx: Path, tmp_path: Path) -> None:
    target = Target("onnxruntime", 2, SHAPE, precision="bf16")
    with pytest.raises(UsageError, match="bf16"):
        backend.build(onnx, target, tmp_path)
    with pytest.raises(UsageError, match="bf16"):
        backend.load(engine_of(onnx, 0.0), target)


def test_an_engine_of_another_image_size_is_refused_with_both_shapes(onnx: Path) -> None:
    with pytest.raises(RunError, match=r"2x3x8x8.*2x3x16x16"):
        backend.load(engine_of(onnx, 0.0), Target("onnxruntime", 2, (3, 16, 16), threads=1))


def test_a_free_batch_dimension_of_any_name_is_set_to_the_targets(onnx: Path, tmp_path: Path) -> None:
    proto = onnx_package.load(onnx)
    for value in (*proto.graph.input, *proto.graph.output):
        value.type.tensor_type.shape.dim[0].dim_param = "N"
    renamed = tmp_path / "renamed.onnx"
    onnx_package.save(proto, renamed)
    session = backend.load(engine_of(renamed, 0.0), Target("onnxruntime", 5, SHAPE, threads=1))
    assert session.run(np.zeros((7, *SHAPE), np.float32)).shape == (7, 3)
    session.close()


def test_failures_carry_onnxruntimes_own_message(tmp_path: Path) -> None:
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"no engine")
    with pytest.raises(RunError, match=r"(?i)protobuf parsing failed; export the network anew"):
        backend.load(engine_of(broken, 0.0), Target("onnxruntime", 2, SHAPE, threads=1))


def test_threads_default_to_all_cores() -> None:
    assert backend.fingerprint(Target("onnxruntime", 1, SHAPE)).threads == os.cpu_count()
    assert backend.fingerprint(Target("onnxruntime", 1, SHAPE, threads=3)).threads == 3


def test_more_threads_than_cores_still_run(onnx: Path) -> None:
    session = backend.load(
        engine_of(onnx, 0.0), Target("onnxruntime", 2, SHAPE, threads=(os.cpu_count() or 1) + 1)
    )
    assert session.sample().compute_ms > 0
    session.close()
