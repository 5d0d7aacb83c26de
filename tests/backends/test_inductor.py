from __future__ import annotations

import contextlib
import ctypes
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from optpipe.backends import _engine, _inductor_settings
from optpipe.backends import inductor as backend
from optpipe.backends._engine import engine_of
from optpipe.backends._inductor_sessions import CpuSession, CudaSession
from optpipe.errors import MissingError, RunError, UsageError
from optpipe.program_export import export
from optpipe.types import Engine, Precision, Session, Target
from optpipe.zoo import cifar_resnet

ROOT = Path(__file__).resolve().parents[2]
SHAPE = (3, 8, 8)
TARGET = Target("inductor", 4, SHAPE, threads=1)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(128, 5)
    ).eval()


def images(count: int, shape: tuple[int, int, int] = SHAPE) -> NDArray[np.float32]:
    return np.random.default_rng(0).standard_normal((count, *shape), dtype=np.float32)


def logits(model: nn.Module, given: NDArray[np.float32]) -> NDArray[np.float32]:
    with torch.inference_mode():
        return model(torch.from_numpy(given)).numpy()  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("program") / "model.pt2"
    export(network(), SHAPE, 4, path)
    return path


@pytest.fixture(scope="module")
def engine(program: Path) -> Engine:
    if lacking := backend.missing(TARGET):
        pytest.skip(lacking)
    return backend.build(program, TARGET, program.parent / "engine")


@pytest.fixture
def session(engine: Engine) -> Iterator[CpuSession]:
    found = backend.load(engine, TARGET)
    assert isinstance(found, CpuSession)
    yield found
    found.close()


# ---------------------------------------------------------------- targets


def test_importing_the_backend_imports_no_torch() -> None:
    code = "import sys, optpipe.backends.inductor; print(sorted({'numpy', 'torch'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (replace(TARGET, precision="fp16"), r"target\.precision = 'fp16': .*'cpu'"),
        (replace(TARGET, device="cuda", precision="bf16"), r"target\.precision = 'bf16': .*fp32, fp16"),
        (replace(TARGET, threads=0), r"target\.threads = 0"),
        (replace(TARGET, options=(("cuda_graph", "on"),)), r"target\.options\.cuda_graph .*freezing"),
        (replace(TARGET, options=(("freezing", "maybe"),)), r"target\.options\.freezing = 'maybe'.*\"on\""),
    ],
)
def test_a_target_it_cannot_serve_is_a_usage_error(target: Target, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        backend.missing(target)


def test_a_switch_may_be_written_as_toml_or_as_python_writes_it() -> None:
    for word in ("on", "true", "True"):
        assert backend._switches(replace(TARGET, options=(("max_autotune", word),)))["max_autotune"]


def test_a_missing_compiler_is_named_with_its_mend(
    monkeypatch: pytest.MonkeyPatch, program: Path, tmp_path: Path
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler -m64")
    assert "needs a C++ compiler" in str(backend.missing(TARGET))
    assert dict(backend.fingerprint(TARGET).versions)["compiler"] == ""
    with pytest.raises(MissingError, match="install g"):
        backend.build(program, TARGET, tmp_path)


def test_a_missing_gpu_is_told_from_a_torch_without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    target = replace(TARGET, device="cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "13.2")
    assert "finds no NVIDIA GPU: check with nvidia-smi" in str(backend.missing(target))
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "is built without CUDA" in str(backend.missing(target))
    with pytest.raises(MissingError, match="is built without CUDA"):
        backend.fingerprint(target)


def test_the_fingerprint_holds_what_decides_the_code() -> None:
    found = backend.fingerprint(TARGET)
    assert found == backend.fingerprint(TARGET)
    assert dict(found.versions)["inductor"] == torch.__version__
    assert set(dict(found.versions)) == {"inductor", "torch", "compiler", "processor"}
    assert found.threads == 1
    assert backend.fingerprint(replace(TARGET, threads=None)).threads == os.cpu_count()


# ---------------------------------------------------------------- building


def test_a_build_leaves_only_the_engine(engine: Engine) -> None:
    assert os.listdir(engine.path.parent) == ["engine.pt2"]  # noqa: PTH208 - hidden files too
    assert engine.build_s > 0


@pytest.mark.slow
def test_a_build_is_silent_and_leaves_torchs_settings_as_they_were(
    program: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    if lacking := backend.missing(TARGET):
        pytest.skip(lacking)
    target = replace(TARGET, threads=2, options=(("max_autotune", "on"), ("freezing", "off")))
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        built = backend.build(program, target, tmp_path)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    assert capfd.readouterr() == ("", "")
    session = backend.load(built, target)
    np.testing.assert_allclose(session.run(images(5)), logits(network(), images(5)), atol=1e-5)
    session.close()


def test_a_program_of_another_shape_is_refused_with_both(program: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"4x3x8x8.*5x3x8x8"):
        backend.build(program, replace(TARGET, batch=5), tmp_path)


def test_a_file_that_is_no_program_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "broken.pt2").write_bytes(b"no program")
    with pytest.raises(RunError, match=r"broken\.pt2 is no torch\.export program"):
        backend.build(tmp_path / "broken.pt2", TARGET, tmp_path)
    with pytest.raises(RunError, match=r"no program at .*absent\.pt2"):
        backend.build(tmp_path / "absent.pt2", TARGET, tmp_path)


def test_the_compilers_own_complaint_reaches_the_user(
    monkeypatch: pytest.MonkeyPatch, program: Path, tmp_path: Path
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError(
            "C++ compile error\n\nCommand:\ng++ a.cpp\n\nOutput:\na.cpp:1:10: fatal error: no omp.h"
        )

    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", fail)
    with pytest.raises(RunError, match=r"model\.pt2: a\.cpp:1:10: fatal error: no omp\.h"):
        backend.build(program, TARGET, tmp_path)


def test_an_error_of_triton_reaches_the_user(
    monkeypatch: pytest.MonkeyPatch, program: Path, tmp_path: Path
) -> None:
    class TritonError(Exception):
        """Triton's errors are no RuntimeError."""

    def fail(*_: object, **__: object) -> None:
        raise TritonError("PTXAS error: out of registers\nmore of it")

    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", fail)
    with pytest.raises(RunError, match=r"cannot compile .*model\.pt2: PTXAS error: out of registers$"):
        backend.build(program, TARGET, tmp_path)


# ---------------------------------------------------------------- running


def test_images_of_any_strides_give_torchs_logits_though_the_package_trusts_them(session: CpuSession) -> None:
    plain = images(4)
    expected = logits(network(), plain)
    last = torch.from_numpy(plain).to(memory_format=torch.channels_last)
    np.testing.assert_allclose(session.run(last.numpy()), expected, atol=1e-5)
    # What run() is for: the package itself reads the same images in the wrong order, and says nothing.
    with torch.inference_mode():
        trusted = session._package(last).numpy()
    assert np.abs(trusted - expected).max() > 0.1


def test_runs_on_the_targets_threads_and_gives_torchs_own_back(session: CpuSession) -> None:
    package, seen = session._package, []

    def spy(given: torch.Tensor) -> torch.Tensor:
        seen.append((torch.get_num_threads(), torch.is_grad_enabled()))
        return package(given)  # type: ignore[no-any-return]

    session._package = spy
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        session.run(images(5))
        session.sample()
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    assert seen == [(1, False)] * 3


def test_what_was_checked_is_what_is_opened(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "engine.pt2"
    copy.write_bytes(engine.path.read_bytes())

    def swapping(checked: Engine) -> bytes:
        content = _engine.checked_bytes(checked)
        copy.write_bytes(b"another engine")
        return content

    monkeypatch.setattr(backend, "checked_bytes", swapping)
    session = backend.load(engine_of(copy, 0.0), TARGET)
    np.testing.assert_allclose(session.run(images(4)), logits(network(), images(4)), atol=1e-5)
    session.close()


def test_a_file_that_is_no_engine_is_refused_in_one_line_and_without_a_log(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "broken.pt2").write_bytes(b"no engine")
    with pytest.raises(RunError, match=r"cannot run .*broken\.pt2: [^\n]+; build it again"):
        backend.load(engine_of(tmp_path / "broken.pt2", 0.0), TARGET)
    assert capfd.readouterr() == ("", "")


class Gpu:
    """What a session on CUDA calls in torch: every recording of a graph fails as torch 2.11's may.

    There the stream of a recording that failed stays the current one.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.current, self.emptied = "the caller's", 0
        for name in ("stream", "graph", "empty_cache"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))
        monkeypatch.setattr(torch.cuda, "CUDAGraph", object)

    @contextlib.contextmanager
    def stream(self, stream: str) -> Iterator[None]:
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    @contextlib.contextmanager
    def graph(self, graph: object, stream: str, capture_error_mode: str) -> Iterator[None]:
        assert capture_error_mode == "thread_local"
        self.current = stream
        yield
        raise RuntimeError("operation not permitted when stream is capturing\nmore of it")

    def empty_cache(self) -> None:
        self.emptied += 1


def test_a_graph_that_cannot_be_recorded_leaves_the_callers_stream_and_is_noted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gpu, session = Gpu(monkeypatch), CudaSession.__new__(CudaSession)
    session._stream, session._graph = "its own", None  # type: ignore[assignment]
    session._input = torch.zeros(1)
    seen: list[str] = []
    session._package = lambda images: seen.append(gpu.current)
    (note,) = session._record()
    assert note.startswith("no CUDA graph: operation not permitted when stream is capturing; each run")
    assert (seen, gpu.current, session._graph) == (["its own"], "the caller's", None)


def test_closing_gives_the_gpus_memory_to_other_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, session = Gpu(monkeypatch), CudaSession.__new__(CudaSession)
    session.close()
    assert gpu.emptied == 1


def test_threads_that_may_spin_are_noted(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")
    assert backend.load(engine, TARGET).notes == ()
    monkeypatch.delenv("OMP_WAIT_POLICY")
    assert "set OMP_WAIT_POLICY=PASSIVE" in backend.load(engine, TARGET).notes[0]


def test_tf32_is_off_only_inside() -> None:
    def settings() -> tuple[bool, bool]:
        return torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32

    before = settings()
    with pytest.raises(RuntimeError), _inductor_settings.true_fp32():
        assert settings() == (False, False)
        raise RuntimeError
    assert settings() == before


PLACES = """
import ctypes
from functools import partial
from optpipe.backends import _inductor_settings
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
large = libc.malloc(8 << 20)
blocks = [libc.malloc(100)]
libc.free(large)  # what a heap gives next
inside = set()
for size in (300_000, 1 << 20, 3_333_333):
    blocks += [
        _inductor_settings.in_blocks_of_their_own(partial(libc.malloc, size)),
        libc.malloc(size + 16),
    ]
    inside.add(blocks[-2] % 4096)
print(len(inside))
"""


def test_blocks_of_memory_for_weights_start_at_one_place_in_a_page() -> None:
    """In a process of its own: in one that has long run, a thread may get a heap with large free blocks."""
    if not hasattr(ctypes.CDLL(None), "mallopt"):
        pytest.skip("the C library is not glibc")
    command = [sys.executable, "-c", PLACES]
    done = subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert done.stdout == "1\n"


# ---------------------------------------------------------------- whole networks


def resnet20() -> nn.Module:
    torch.manual_seed(0)
    made = cifar_resnet.resnet20().train()
    with torch.no_grad():
        made(torch.randn(64, 3, 32, 32))
    return made.eval()


def opened(target: Target, folder: Path) -> Session:
    """A session of ResNet-20's engine, or a skip that says what is missing."""
    if lacking := backend.missing(target):
        pytest.skip(lacking)
    export(resnet20(), target.input_shape, target.batch, folder / "program.pt2")
    return backend.load(backend.build(folder / "program.pt2", target, folder), target)


def largest_difference(session: Session) -> float:
    """As a fraction of the largest logit, on more images than a batch."""
    given = images(40, (3, 32, 32))
    expected = logits(resnet20(), given)
    return float(np.abs(session.run(given) - expected).max() / np.abs(expected).max())


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-5), ("bf16", 3e-2)])
def test_resnet20_computes_what_torch_does(precision: Precision, tolerance: float, tmp_path: Path) -> None:
    if precision not in backend.precisions("cpu"):
        pytest.skip(f"this processor has no instructions for {precision}")
    session = opened(Target("inductor", 16, (3, 32, 32), precision, threads=2), tmp_path)
    assert largest_difference(session) < tolerance
    session.close()


@pytest.mark.gpu
@pytest.mark.parametrize("graph", ["on", "off"])
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-5), ("fp16", 1e-2)])
def test_resnet20_on_a_gpu_computes_what_torch_does(
    precision: Precision, tolerance: float, graph: str, tmp_path: Path
) -> None:
    options = (("cuda_graph", graph),)
    session = opened(Target("inductor", 16, (3, 32, 32), precision, "cuda", options=options), tmp_path)
    assert largest_difference(session) < tolerance
    assert session.notes[0].startswith("CUDA graph" if graph == "on" else "no CUDA graph")
    sample = session.sample()
    for figure in (sample.compute_ms, sample.enqueue_ms, sample.h2d_ms, sample.d2h_ms):
        assert figure is not None
        assert figure > 0
    assert largest_difference(session) < tolerance
    session.close()
    session.close()
