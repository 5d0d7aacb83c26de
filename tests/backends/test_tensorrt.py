"""The tensorrt backend on a GPU that is not there: what it refuses, and how it builds."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from conftest import WriteOnnx
from fake_tensorrt import RELEASES
from fake_tensorrt_runtime import LINES, Machine

from optpipe.backends import tensorrt as backend
from optpipe.errors import RunError, UsageError
from optpipe.types import Precision, Target

SHAPE = (3, 16, 16)


def target_of(*options: tuple[str, str], batch: int = 4, precision: Precision = "fp32") -> Target:
    return Target("tensorrt", batch, SHAPE, precision, "cuda", options=options)


@pytest.fixture(params=RELEASES)
def machine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Machine:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    found = Machine(request.param)
    found.install(monkeypatch)
    return found


@pytest.fixture
def onnx(write_onnx: WriteOnnx) -> Path:
    return write_onnx("model.onnx")


def test_importing_the_backend_imports_no_library_of_nvidia_and_no_torch() -> None:
    code = (
        "import sys, optpipe.backends.tensorrt; "
        "print(sorted({'tensorrt', 'cuda', 'pynvml', 'torch', 'numpy'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_it_runs_three_precisions_on_a_gpu_and_none_on_a_cpu() -> None:
    assert backend.precisions("cuda") == ("fp32", "fp16", "int8")
    assert backend.precisions("cpu") == ()


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (Target("tensorrt", 1, SHAPE), "target.device = 'cpu': .* add --gpu"),
        (target_of(precision="bf16"), "target.precision = 'bf16': .* fp32, fp16, int8"),
        (target_of(batch=0), "target.batch = 0"),
        (
            target_of(("no_such_option", "1")),
            "target.options.no_such_option = '1': .*optimization_level, work",
        ),
        (target_of(("optimization_level", "6")), "target.options.optimization_level = '6': .* from 0 to 5"),
        (target_of(("workspace_mb", "-1")), "target.options.workspace_mb = '-1': .* from 1 to"),
        (target_of(("max_aux_streams", "many")), "target.options.max_aux_streams = 'many': .* from 0 to"),
        (target_of(("avg_timing_iterations", "0")), "avg_timing_iterations = '0': .* from 1 to"),
        (target_of(("cuda_graph", "perhaps")), "target.options.cuda_graph = 'perhaps': must be \"on\" or"),
        (target_of(("sparse_weights", "")), "target.options.sparse_weights = ''"),
        (target_of(("timing_cache", "")), "target.options.timing_cache = '': must be the path"),
        (target_of(("profile", "1,4")), "target.options.profile = '1,4': .*1,4,4"),
        (target_of(("profile", "5,6,7")), "target.options.profile = '5,6,7'"),
        (target_of(("profile", "4,2,8")), "target.options.profile = '4,2,8'"),
    ],
)
def test_a_target_that_no_machine_runs_is_a_usage_error(target: Target, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        backend.missing(target)


def test_nothing_is_missing_where_all_is_there(machine: Machine) -> None:
    assert backend.missing(target_of()) is None


def test_each_missing_piece_is_named_with_the_command_that_mends_it(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine.cuda.failing["cudaGetDeviceCount"] = "cudaErrorNoDevice"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    message = str(backend.missing(target_of()))
    assert "no GPU is visible: check nvidia-smi" in message
    assert "TensorRT is not installed: pip install 'optpipe[nvidia]'" in message


def test_libraries_that_do_not_load_are_told_from_a_package_that_is_not_there(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delitem(sys.modules, "tensorrt")
    (tmp_path / "tensorrt.py").write_text("raise ImportError('libnvonnxparser.so.10: cannot open')")
    monkeypatch.syspath_prepend(tmp_path)
    message = str(backend.missing(target_of()))
    assert "TensorRT's libraries cannot be loaded (libnvonnxparser.so.10: cannot open)" in message
    assert "LD_LIBRARY_PATH" in message


def test_a_release_without_strongly_typed_networks_is_refused(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = ModuleType("tensorrt")
    old.__version__ = "8.6.1"  # type: ignore[attr-defined]
    old.__spec__ = machine.trt.__spec__
    monkeypatch.setitem(sys.modules, "tensorrt", old)
    assert str(backend.missing(target_of())).startswith("TensorRT 8.6.1 is older than 10: pip install -U")


def test_fingerprint_is_the_same_each_time_and_names_gpu_and_versions(machine: Machine) -> None:
    found = backend.fingerprint(target_of())
    assert found == backend.fingerprint(target_of())
    assert found.device == "NVIDIA Test 100"
    assert found.driver == "CUDA 13.2"
    assert dict(found.versions) == {
        "tensorrt": machine.trt.__version__,
        "cuda": "13.5",
        "compute capability": "9.0",
    }


def test_the_engine_lies_in_the_folder_and_nothing_temporary_beside_it(
    machine: Machine, onnx: Path, tmp_path: Path
) -> None:
    engine = backend.build(onnx, target_of(), tmp_path / "new" / "folder")
    assert [path.name for path in (tmp_path / "new" / "folder").iterdir()] == ["engine.plan"]
    assert engine.build_s > 0
    assert engine.notes == ()


def test_tf32_is_off_and_all_else_is_left_to_tensorrt_unless_the_recipe_says_so(
    machine: Machine, onnx: Path, tmp_path: Path
) -> None:
    left = dict(backend.build(onnx, target_of(), tmp_path).flags)
    assert (left["tf32"], left["optimization_level"]) == ("off", "TensorRT's default")
    options = {
        "optimization_level": "5",
        "workspace_mb": "64",
        "max_aux_streams": "2",
        "avg_timing_iterations": "3",
        "sparse_weights": "on",
    }
    flags = dict(backend.build(onnx, target_of(*options.items()), tmp_path).flags)
    assert {name: flags[name] for name in options} == options
    plain, asked = machine.configs
    assert (plain.flags, plain.pools, plain.avg_timing_iterations) == (set(), {}, 8)
    assert (plain.builder_optimization_level, plain.max_aux_streams) == (3, 0)
    assert (asked.flags, asked.pools) == ({"SPARSE_WEIGHTS"}, {"WORKSPACE": 64 * 2**20})
    assert (asked.builder_optimization_level, asked.max_aux_streams, asked.avg_timing_iterations) == (5, 2, 3)


def test_a_free_batch_is_built_for_the_targets_batch_or_for_the_range_asked_for(
    machine: Machine, onnx: Path, tmp_path: Path
) -> None:
    backend.build(onnx, target_of(), tmp_path)
    backend.build(onnx, target_of(("profile", "1, 4, 16")), tmp_path)
    shapes = [config.profiles[0].shapes["images"] for config in machine.configs]
    assert shapes == [[(4, *SHAPE)] * 3, [(1, *SHAPE), (4, *SHAPE), (16, *SHAPE)]]


def test_a_fixed_batch_needs_no_profile(machine: Machine, write_onnx: WriteOnnx, tmp_path: Path) -> None:
    backend.build(write_onnx("fixed.onnx", batch=4), target_of(), tmp_path)
    assert machine.configs[0].profiles == []


@pytest.mark.parametrize(("batch", "size"), [(2, 16), ("batch", 32)])
def test_a_network_for_other_images_is_refused_with_both_shapes(
    machine: Machine, write_onnx: WriteOnnx, tmp_path: Path, batch: int | str, size: int
) -> None:
    with pytest.raises(RunError, match=rf"(2|-1)x3x{size}x{size}, the target has 4x3x16x16"):
        backend.build(write_onnx("other.onnx", batch=batch, size=size), target_of(), tmp_path)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("builder", r"cannot start a builder: CUDA initialization failure with error: 35; .*doctor --gpu"),
        ("network", r"cannot start a network: createNetworkV2: .*doctor --gpu"),
        ("build", r"model\.onnx in fp32: .*Could not find any implementation.*target\.backend"),
        ("profile", r"at batches 4 to 4: .*kOPT dimensions.*target\.options\.profile"),
        ("profile_shape", r"at batches 4 to 4 \(Shape provided for min is inconsistent.*target\.input_shape"),
    ],
)
def test_what_tensorrt_refuses_reaches_the_user_in_its_own_words(
    machine: Machine, onnx: Path, tmp_path: Path, fault: str, message: str
) -> None:
    machine.faults.add(fault)
    with pytest.raises(RunError, match=message):
        backend.build(onnx, target_of(), tmp_path / "engine")
    assert not (tmp_path / "engine").exists()


def test_each_error_of_the_parser_is_told_with_its_node(machine: Machine, onnx: Path, tmp_path: Path) -> None:
    machine.parser_errors = [("No importer registered for op:\n Foo", "/stem/foo"), ("Assertion failed", "")]
    with pytest.raises(RunError) as caught:
        backend.build(onnx, target_of(), tmp_path)
    message = str(caught.value)
    assert f"TensorRT cannot read {onnx}: ModelImporter.cpp:729" in message
    assert "No importer registered for op: Foo (node /stem/foo); Assertion failed; export" in message


def test_a_file_that_is_no_network_is_refused_by_name(machine: Machine, tmp_path: Path) -> None:
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"no network")
    for path in (broken, tmp_path / "absent.onnx"):
        with pytest.raises(RunError, match=rf"cannot read .*{path.name}: Failed to parse"):
            backend.build(path, target_of(), tmp_path)


def test_a_failure_is_told_with_its_own_lines_and_not_with_those_before_it(
    machine: Machine, onnx: Path, tmp_path: Path
) -> None:
    machine.faults.add("network")
    with pytest.raises(RunError):
        backend.build(onnx, target_of(), tmp_path)
    machine.faults = {"build"}
    with pytest.raises(RunError) as caught:
        backend.build(onnx, target_of(), tmp_path)
    assert LINES["build"].rstrip(".") in str(caught.value)
    assert LINES["network"] not in str(caught.value)
    assert "a warning" not in str(caught.value)


def test_a_folder_that_cannot_be_written_is_named(machine: Machine, onnx: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"engine\.plan: cannot be written"):
        backend.build(onnx, target_of(), tmp_path / "file")
