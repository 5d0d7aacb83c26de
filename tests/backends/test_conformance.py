"""What every backend must do on every device; a new file in optpipe/backends is picked up by its name."""

from __future__ import annotations

import importlib
import inspect
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from optpipe import onnx_export, plugins, program_export
from optpipe.errors import RunError, UsageError
from optpipe.types import Backend, DeviceState, Engine, LayerTimer, Precision, Session, Target

SHAPE = (3, 8, 8)
BATCH = 4
CLASSES = 5
DEVICES = ("cpu", "cuda")
TOLERANCE: dict[Precision, float] = {"fp32": 1e-5, "fp16": 3e-3, "bf16": 3e-2, "int8": 6e-2}
"""The largest difference of a logit as a fraction of the largest logit; int8's is the quantization's own."""


@dataclass(frozen=True, slots=True)
class Case:
    """A backend on a device at a precision."""

    backend: str
    device: str
    precision: Precision

    def __str__(self) -> str:
        return f"{self.backend}-{self.device}-{self.precision}"

    @property
    def module(self) -> Backend:
        return plugins.backend(self.backend)

    @property
    def target(self) -> Target:
        return Target(self.backend, BATCH, SHAPE, self.precision, self.device, threads=1)


def cases() -> list[Case]:
    """All backends on all devices, at each of their precisions."""
    return [
        Case(name, device, precision)
        for name in plugins.names("backends")
        for device in DEVICES
        for precision in plugins.backend(name).precisions(device)
    ]


def parameters(found: list[Case]) -> list[object]:
    return [pytest.param(case, id=str(case), marks=marks(case)) for case in found]


def marks(case: Case) -> list[pytest.MarkDecorator]:
    if case.device == "cuda":
        return [pytest.mark.gpu]
    compiles = case.module.SOURCE == "program"
    return [pytest.mark.slow] if compiles else []  # a quick look at it is in test_inductor.py


EVERY_PRECISION = parameters(cases())
EVERY_DEVICE = parameters([case for case in cases() if case.precision == "fp32"])


def images(count: int, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal((count, *SHAPE), dtype=np.float32)


@pytest.fixture(scope="module")
def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, CLASSES),
    ).eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("conformance")


@pytest.fixture(scope="module")
def onnx(network: nn.Module, folder: Path) -> Path:
    path = folder / "model.onnx"
    onnx_export.export(network, SHAPE, BATCH, path)
    return path


@pytest.fixture(scope="module")
def program(network: nn.Module, folder: Path) -> Path:
    path = folder / "program.pt2"
    program_export.export(network, SHAPE, BATCH, path)
    return path


@pytest.fixture(scope="module")
def half(onnx: Path) -> Path:
    """The network in fp16, with fp32 inputs and outputs."""
    import onnx as onnx_package
    from onnxruntime.transformers.float16 import convert_float_to_float16

    path = onnx.with_suffix(".fp16.onnx")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # weights that are too small for fp16
        converted = convert_float_to_float16(onnx_package.load(onnx), keep_io_types=True)
    onnx_package.save(converted, path)
    return path


class Calibration:
    """A few batches of images, as ONNX Runtime's quantizer reads them."""

    def __init__(self) -> None:
        self._batches = iter([{"input": images(BATCH, seed)} for seed in range(8)])

    def get_next(self) -> dict[str, NDArray[np.float32]] | None:
        return next(self._batches, None)


def quantized(source: Path) -> Path:
    """The network of ``source`` as symmetric int8 QDQ, with per-channel weights."""
    from onnxruntime import quantization

    path = source.with_suffix(".int8.onnx")
    quantization.quantize_static(
        source,
        path,
        Calibration(),
        quant_format=quantization.QuantFormat.QDQ,
        per_channel=True,
        activation_type=quantization.QuantType.QInt8,
        weight_type=quantization.QuantType.QInt8,
        op_types_to_quantize=["Conv", "Gemm"],
        extra_options={"ActivationSymmetric": True},
    )
    return path


@pytest.fixture(scope="module")
def int8(onnx: Path) -> Path:
    return quantized(onnx)


@pytest.fixture(scope="module")
def int8_half(half: Path) -> Path:
    return quantized(half)


@pytest.fixture(scope="module")
def built(request: pytest.FixtureRequest) -> Callable[[Case], Engine]:
    """A function that builds a case's engine once for all tests, or skips saying what is missing."""
    found: dict[Case, Engine] = {}

    def build(case: Case) -> Engine:
        if lacking := case.module.missing(case.target):
            pytest.skip(lacking)
        if case not in found:
            source = request.getfixturevalue(source_of(case))
            into = request.getfixturevalue("folder") / str(case)
            found[case] = case.module.build(source, case.target, into)
        return found[case]

    return build


def source_of(case: Case) -> str:
    """The fixture that makes the file that the case's engine is built from."""
    if case.module.SOURCE == "program":
        return "program"
    if case.precision == "int8":
        return "int8" if case.module.INT8_REST == "fp32" else "int8_half"
    return "half" if case.precision == "fp16" else "onnx"


@pytest.fixture
def engine(case: Case, built: Callable[[Case], Engine]) -> Engine:
    return built(case)


@pytest.fixture
def session(case: Case, engine: Engine) -> Iterator[Session]:
    found = case.module.load(engine, case.target)
    yield found
    found.close()


# ---------------------------------------------------------------- the protocol


@pytest.mark.parametrize("name", plugins.names("backends"))
def test_takes_the_arguments_of_the_protocol(name: str) -> None:
    backend = plugins.backend(name)
    for function in ("precisions", "missing", "fingerprint", "build", "load"):
        wanted = list(inspect.signature(getattr(Backend, function)).parameters)[1:]
        assert list(inspect.signature(getattr(backend, function)).parameters) == wanted


@pytest.mark.parametrize("name", plugins.names("backends"))
def test_says_what_it_builds_from_and_whether_a_second_build_is_quicker(name: str) -> None:
    backend = plugins.backend(name)
    assert backend.SOURCE in ("onnx", "program")
    assert backend.CACHES_BUILDS in (True, False)
    assert backend.INT8_REST in ("fp32", "fp16")


@pytest.mark.parametrize("name", plugins.names("backends"))
def test_runs_fp32_wherever_it_runs_and_nothing_elsewhere(name: str) -> None:
    backend = plugins.backend(name)
    offered = {device: backend.precisions(device) for device in (*DEVICES, "tpu")}
    assert offered["tpu"] == ()
    assert any(offered.values())
    for found in offered.values():
        assert not found or found[0] == "fp32"
        assert set(found) <= set(TOLERANCE)
        assert len(set(found)) == len(found)


@pytest.mark.parametrize("name", plugins.names("backends"))
def test_importing_it_imports_no_sdk(name: str) -> None:
    source = inspect.getsource(importlib.import_module(f"optpipe.backends.{name}"))
    for sdk in ("torch", "numpy", "onnxruntime", "openvino", "tensorrt", "cuda", "pynvml"):
        assert f"\nimport {sdk}" not in source
        assert f"\nfrom {sdk}" not in source


@pytest.mark.parametrize("case", EVERY_DEVICE)
def test_an_option_that_the_backend_does_not_know_is_refused_by_name(case: Case) -> None:
    with pytest.raises(UsageError, match="no_such_option"):
        case.module.missing(replace(case.target, options=(("no_such_option", "1"),)))


@pytest.mark.parametrize("case", EVERY_DEVICE)
@pytest.mark.parametrize(("field", "value"), [("batch", 0), ("device", "tpu"), ("precision", "fp8")], ids=str)
def test_a_target_that_it_runs_on_no_machine_is_refused_by_its_field(
    case: Case, field: str, value: object
) -> None:
    changed = {"batch": case.target.batch, "device": case.device, "precision": case.precision, field: value}
    target = Target(
        case.backend,
        changed["batch"],  # type: ignore[arg-type]
        SHAPE,
        changed["precision"],  # type: ignore[arg-type]
        changed["device"],  # type: ignore[arg-type]
        threads=1,
    )
    with pytest.raises(UsageError, match=rf"target\.{field} = '?{value}"):
        case.module.missing(target)


@pytest.mark.parametrize("case", EVERY_DEVICE)
def test_fingerprint_is_the_same_each_time_and_names_the_device_and_the_version(
    case: Case, engine: Engine
) -> None:
    found = case.module.fingerprint(case.target)
    assert found == case.module.fingerprint(case.target)
    assert found.device
    assert found.driver
    assert any(name.startswith(_package(case.backend)) and value for name, value in found.versions)


def _package(backend: str) -> str:
    return "torch" if backend == "inductor" else backend


# ---------------------------------------------------------------- what it computes


@pytest.mark.parametrize("case", EVERY_PRECISION)
def test_any_number_of_images_gives_torchs_logits(case: Case, session: Session, network: nn.Module) -> None:
    for count in (1, BATCH, BATCH + 1, 3 * BATCH):
        given = images(count, seed=count)
        with torch.inference_mode():
            expected = network(torch.from_numpy(given)).numpy()
        got = session.run(given)
        assert got.dtype == np.float32
        np.testing.assert_allclose(
            got, expected, rtol=0, atol=TOLERANCE[case.precision] * np.abs(expected).max()
        )


@pytest.mark.parametrize("case", EVERY_DEVICE)
def test_strides_of_the_images_do_not_matter(case: Case, session: Session) -> None:
    plain = images(BATCH)
    expected = session.run(plain)
    last = np.ascontiguousarray(plain.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
    wide = np.zeros((2 * BATCH, 3, 16, 16), np.float32)
    wide[::2, :, ::2, 4:12] = plain
    for given in (last, wide[::2, :, ::2, 4:12], plain[::-1].copy()[::-1], plain.astype(">f4")):
        assert not given.flags.c_contiguous or given.dtype != np.float32
        np.testing.assert_array_equal(session.run(given), expected)


@pytest.mark.parametrize("case", EVERY_DEVICE)
def test_padding_leaves_no_trace(case: Case, session: Session) -> None:
    alone = session.run(images(1))
    session.run(np.full((BATCH, *SHAPE), 7.0, np.float32))
    np.testing.assert_array_equal(session.run(images(1)), alone)


@pytest.mark.parametrize("case", EVERY_DEVICE)
def test_the_images_given_are_left_alone(case: Case, session: Session) -> None:
    given = images(BATCH)
    kept = given.copy()
    given.flags.writeable = False
    session.run(given)
    np.testing.assert_array_equal(given, kept)


@pytest.mark.parametrize("case", EVERY_DEVICE)
def test_results_of_one_run_survive_the_next(case: Case, session: Session) -> None:
    first = session.run(images(2))
    kept = first.copy()
    session.run(np.zeros((2, *SHAPE), np.float32))
    session.sample()
    np.testing.assert_array_equal(first, kept)


@pytest.mark.parametrize("case", EVERY_DEVICE)
def test_two_sessions_at_once_give_the_same_logits(case: Case, engine: Engine, session: Session) -> None:
    other = case.module.load(engine, case.target)
    try:
        expected = session.run(images(BATCH))
        for seed in (1, 2):
            other.run(images(BATCH, seed))
            session.sample()
        # On a GPU each session chooses algorithms by timing them, which may round otherwise.
        apart = 0.0 if case.device == "cpu" else TOLERANCE[case.precision] * np.abs(expected).max()
        np.testing.assert_allclose(other.run(images(BATCH)), expected, rtol=0, atol=apart)
        np.testing.assert_array_equal(session.run(images(BATCH)), expected)
    finally:
        other.close()
    np.testing.assert_array_equal(session.run(images(BATCH)), expected)


@pytest.mark.parametrize("case", EVERY_DEVICE)
@pytest.mark.parametrize("shape", [(2, 3, 9, 9), (2, 1, 8, 8), (0, 3, 8, 8), (3, 8, 8)])
def test_images_of_another_shape_are_refused_with_both_shapes(
    case: Case, session: Session, shape: tuple[int, ...]
) -> None:
    with pytest.raises(RunError, match=f"4x3x8x8.*{'x'.join(map(str, shape))}"):
        session.run(np.zeros(shape, np.float32))


# ---------------------------------------------------------------- timing


@pytest.mark.parametrize("case", EVERY_PRECISION)
def test_sample_measures_real_time(case: Case, session: Session) -> None:
    for sample in [session.sample() for _ in range(5)]:
        assert 0 < sample.compute_ms < 10_000
        waits = any("waits for the GPU" in note for note in session.notes)
        assert (sample.enqueue_ms is None) == (waits or case.device == "cpu")
        for copied in (sample.h2d_ms, sample.d2h_ms):
            assert (copied is None) == (case.device == "cpu")
        for other in (sample.enqueue_ms, sample.h2d_ms, sample.d2h_ms):
            assert other is None or 0 < other < 10_000


@pytest.mark.parametrize("case", EVERY_DEVICE)
def test_says_what_its_headline_is_and_how_it_runs(case: Case, session: Session) -> None:
    assert session.headline == {"cpu": "Latency", "cuda": "GPU Compute Time"}[case.device]
    assert all(isinstance(note, str) and note for note in session.notes)


@pytest.mark.parametrize("case", EVERY_DEVICE)
def test_state_is_the_devices_or_none_on_a_cpu(case: Case, session: Session) -> None:
    state = session.state()
    if case.device == "cpu":
        assert state is None
    else:
        assert isinstance(state, DeviceState)
        assert state.sm_clock_mhz > 0


@pytest.mark.parametrize("case", EVERY_DEVICE)
def test_closing_twice_is_fine(case: Case, session: Session) -> None:
    session.run(images(1))
    session.close()
    session.close()


@pytest.mark.parametrize("case", EVERY_PRECISION)
def test_layers_tell_their_times_where_the_backend_can(case: Case, engine: Engine) -> None:
    module = case.module
    if not isinstance(module, LayerTimer):
        assert case.backend == "inductor", "its kernels are no layers any more"
        return
    assert list(inspect.signature(module.layer_times).parameters) == ["engine", "target", "repeats"]
    found = module.layer_times(engine, case.target, 5)
    if case.backend == "onnxruntime" and case.device == "cuda":
        assert found == ()
        return
    assert any("conv" in layer.kind.lower() for layer in found)
    assert len({layer.name for layer in found}) == len(found)
    assert all(0 <= layer.ms < 1000 for layer in found)
    assert sum(layer.ms for layer in found) > 0


@pytest.mark.parametrize("case", EVERY_DEVICE)
def test_telling_times_leaves_the_timed_session_as_it_was(
    case: Case, engine: Engine, session: Session
) -> None:
    expected = session.run(images(BATCH))
    if isinstance(case.module, LayerTimer):
        case.module.layer_times(engine, case.target, 2)
    np.testing.assert_array_equal(session.run(images(BATCH)), expected)


# ---------------------------------------------------------------- engines


@pytest.mark.parametrize("case", EVERY_PRECISION)
def test_an_engine_is_a_file_with_its_digest(case: Case, engine: Engine) -> None:
    import hashlib

    assert engine.sha256 == hashlib.sha256(engine.path.read_bytes()).hexdigest()
    assert engine.build_s >= 0
    assert engine.timing_cache is None or case.module.CACHES_BUILDS


@pytest.mark.parametrize("case", EVERY_DEVICE)
def test_building_leaves_nothing_temporary(case: Case, engine: Engine, folder: Path) -> None:
    left = [path.name for path in folder.rglob("*") if "tmp" in path.name]
    assert left == []


@pytest.mark.parametrize("case", EVERY_DEVICE)
def test_an_engine_whose_bytes_changed_is_refused_before_anything_is_loaded(
    case: Case, engine: Engine, tmp_path: Path
) -> None:
    """The bytes here are no engine at all: to open them would give the SDK's error and not the digest's."""
    broken = tmp_path / f"broken{engine.path.suffix}"
    broken.write_bytes(b"no engine")
    with pytest.raises(RunError, match=rf"{broken.name}.*sha256 is .*recorded is {engine.sha256[:16]}"):
        case.module.load(replace(engine, path=broken), case.target)
    with broken.open("wb") as file:
        file.write(engine.path.read_bytes() + b"\0")
    with pytest.raises(RunError, match=r"sha256 is"):
        case.module.load(replace(engine, path=broken), case.target)


@pytest.mark.parametrize("case", EVERY_DEVICE)
def test_a_file_that_is_no_engine_is_refused_by_name(case: Case, engine: Engine, tmp_path: Path) -> None:
    from optpipe.backends._engine import engine_of

    broken = tmp_path / f"broken{engine.path.suffix}"
    broken.write_bytes(b"no engine")
    with pytest.raises(RunError, match=r"broken\."):
        case.module.load(engine_of(broken, 0.0), case.target)


@pytest.mark.parametrize("case", EVERY_DEVICE)
def test_an_absent_engine_is_refused_by_name(case: Case, engine: Engine, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"absent\.bin"):
        case.module.load(replace(engine, path=tmp_path / "absent.bin"), case.target)


@pytest.mark.parametrize("case", EVERY_DEVICE)
def test_a_source_that_is_not_there_is_refused_by_name(case: Case, engine: Engine, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"absent\.onnx"):
        case.module.build(tmp_path / "absent.onnx", case.target, tmp_path)
