"""What every backend must do; a new file in optpipe/backends is picked up by its name."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import nn

import optpipe.backends
from optpipe.errors import RunError, UsageError
from optpipe.onnx_export import export
from optpipe.types import Backend, Target

NAMES = sorted(module.name for module in pkgutil.iter_modules(optpipe.backends.__path__))
SHAPE = (3, 8, 8)
BATCH = 4


@pytest.fixture(params=NAMES)
def backend(request: pytest.FixtureRequest) -> ModuleType:
    return importlib.import_module(f"optpipe.backends.{request.param}")


@pytest.fixture
def target(backend: ModuleType) -> Target:
    target = Target(backend.__name__.rpartition(".")[2], BATCH, SHAPE, threads=1)
    if lacking := backend.missing(target):
        pytest.skip(lacking)
    return target


@pytest.fixture(scope="module")
def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 5),
    ).eval()


@pytest.fixture(scope="module")
def onnx(network: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("onnx") / "model.onnx"
    export(network, SHAPE, BATCH, path)
    return path


def test_takes_the_arguments_of_the_protocol(backend: ModuleType) -> None:
    for name in ("missing", "fingerprint", "build", "load"):
        wanted = list(inspect.signature(getattr(Backend, name)).parameters)[1:]
        assert list(inspect.signature(getattr(backend, name)).parameters) == wanted


def test_any_number_of_images_gives_torchs_logits(
    backend: ModuleType, target: Target, network: nn.Module, onnx: Path, tmp_path: Path
) -> None:
    session = backend.load(backend.build(onnx, target, tmp_path), target)
    for count in (1, BATCH, BATCH + 1, 3 * BATCH):
        images = np.random.default_rng(count).standard_normal((count, *SHAPE), dtype=np.float32)
        with torch.inference_mode():
            expected = network(torch.from_numpy(images)).numpy()
        got = session.run(images)
        assert got.dtype == np.float32
        np.testing.assert_allclose(got, expected, atol=1e-5)
    session.close()


def test_results_of_one_run_survive_the_next(
    backend: ModuleType, target: Target, onnx: Path, tmp_path: Path
) -> None:
    session = backend.load(backend.build(onnx, target, tmp_path), target)
    first = session.run(np.ones((2, *SHAPE), np.float32))
    kept = first.copy()
    session.run(np.zeros((2, *SHAPE), np.float32))
    session.sample()
    np.testing.assert_array_equal(first, kept)
    session.close()


def test_sample_measures_real_time(backend: ModuleType, target: Target, onnx: Path, tmp_path: Path) -> None:
    session = backend.load(backend.build(onnx, target, tmp_path), target)
    times = [session.sample().compute_ms for _ in range(5)]
    assert all(0 < time < 10_000 for time in times)
    session.close()


def test_engine_lies_in_the_folder_and_nothing_temporary_beside_it(
    backend: ModuleType, target: Target, onnx: Path, tmp_path: Path
) -> None:
    engine = backend.build(onnx, target, tmp_path / "new" / "folder")
    assert engine.parent == tmp_path / "new" / "folder"
    assert [path for path in engine.parent.iterdir() if path.name.endswith(".tmp")] == []


def test_fingerprint_is_the_same_each_time_and_names_the_device(backend: ModuleType, target: Target) -> None:
    found = backend.fingerprint(target)
    assert found == backend.fingerprint(target)
    assert found.device
    assert target.backend in dict(found.versions)


def test_images_of_another_shape_are_refused_with_both_shapes(
    backend: ModuleType, target: Target, onnx: Path, tmp_path: Path
) -> None:
    session = backend.load(backend.build(onnx, target, tmp_path), target)
    with pytest.raises(RunError, match=r"4x3x8x8.*2x3x9x9"):
        session.run(np.zeros((2, 3, 9, 9), np.float32))
    session.close()


def test_a_file_that_is_no_engine_is_refused_by_name(
    backend: ModuleType, target: Target, tmp_path: Path
) -> None:
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"no engine")
    with pytest.raises(RunError, match=r"broken\.onnx"):
        backend.load(broken, target)
    with pytest.raises(RunError, match=r"absent\.onnx"):
        backend.load(tmp_path / "absent.onnx", target)


def test_an_option_that_the_backend_does_not_know_is_refused_by_name(backend: ModuleType) -> None:
    with pytest.raises(UsageError, match="no_such_option"):
        backend.missing(Target("any", BATCH, SHAPE, options=(("no_such_option", "1"),)))
