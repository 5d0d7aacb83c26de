"""The program that travels in a bundle, run where neither torch nor optpipe can be imported."""

from __future__ import annotations

import ast
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from conftest import WriteOnnx
from numpy.typing import NDArray

from optpipe import data
from optpipe.data import DataSpec, Preprocess
from optpipe.deploy import run_engine

SOURCE = Path(run_engine.__file__)
PREPROCESS = Preprocess((0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
BATCH, SIZE = 4, 16
# What the script must do without is poisoned before it runs.
ALONE = """
import runpy, sys
for name in {absent!r}:
    sys.modules[name] = None
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def write_manifest(folder: Path, **changes: Any) -> None:
    content = (folder / "model.onnx").read_bytes()
    entry = {"precision": "fp32", "backend": "onnxruntime", "engine": "model.onnx", "source": "model.onnx"}
    manifest = {
        "schema": "optpipe.manifest/2",
        "target": {
            "backend": "onnxruntime",
            "batch": BATCH,
            "input_shape": [3, SIZE, SIZE],
            "precision": "fp32",
            "device": "cpu",
            "threads": 1,
            "options": [],
        },
        "preprocess": {"mean": PREPROCESS.mean, "std": PREPROCESS.std, "size": None, "resize": "squash"},
        "files": {"model.onnx": {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}},
        "engines": [entry],
        "built_on": {"device": "another machine"},
        **changes,
    }
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")


@pytest.fixture
def bundle(write_onnx: WriteOnnx) -> Path:
    folder = write_onnx("model.onnx", layers=2, size=SIZE).parent
    shutil.copyfile(SOURCE, folder / "run_engine.py")
    write_manifest(folder)
    return folder


@pytest.fixture
def pixels(bundle: Path) -> NDArray[np.uint8]:
    """Images beside the bundle, in images.npy; more than a batch."""
    found = np.random.default_rng(0).integers(0, 256, (BATCH + 2, SIZE, SIZE, 3), dtype=np.uint8)
    np.save(bundle / "images.npy", found)
    return found


def run(
    bundle: Path, *arguments: str, absent: tuple[str, ...] = (), before: str = ""
) -> subprocess.CompletedProcess[str]:
    code = before + ALONE.format(absent=("torch", "optpipe", *absent))
    return subprocess.run(
        [sys.executable, "-c", code, "run_engine.py", *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=bundle,
        env={**os.environ, "PYTHONPATH": ""},
    )


def expected(bundle: Path, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    """ONNX Runtime's logits of images that optpipe itself prepared."""
    np.savez(bundle / "for_optpipe.npz", images=pixels)
    spec = DataSpec(str(bundle / "for_optpipe.npz"))
    order = np.random.default_rng(0).permutation(len(pixels))
    images = data.load_images(spec, PREPROCESS, 3).batch(slice(None)).numpy()[np.argsort(order)]
    session = onnxruntime.InferenceSession(bundle / "model.onnx", providers=["CPUExecutionProvider"])
    logits: NDArray[np.float32] = session.run(None, {"images": images})[0]
    return logits


# ---------------------------------------------------------------- classify


def test_classes_are_the_engines_without_torch_optpipe_or_pillow(
    bundle: Path, pixels: NDArray[np.uint8]
) -> None:
    done = run(bundle, "images.npy", "--json", "--duration", "0", absent=("PIL",))
    assert done.returncode == 0, done.stderr
    logits = expected(bundle, pixels).astype(np.float64)
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    probabilities = powers / powers.sum(axis=1, keepdims=True)
    found = json.loads(done.stdout)["images"]
    assert [image["classes"] for image in found] == np.argsort(-logits, axis=1)[:, :5].tolist()
    for image, row in zip(found, probabilities, strict=True):
        np.testing.assert_allclose(image["probabilities"], np.sort(row)[:-6:-1], rtol=1e-5)


@pytest.mark.parametrize(
    "preprocess",
    [
        PREPROCESS,
        Preprocess(PREPROCESS.mean, PREPROCESS.std, (16, 16)),
        Preprocess(PREPROCESS.mean, PREPROCESS.std, (16, 16), "crop"),
        Preprocess(PREPROCESS.mean, PREPROCESS.std, (24, 20), "crop"),
    ],
)
@pytest.mark.parametrize("size", [(16, 16), (40, 25), (25, 40)])
def test_images_are_prepared_bit_for_bit_as_optpipe_does(
    tmp_path: Path, preprocess: Preprocess, size: tuple[int, int]
) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (1, *size, 3), dtype=np.uint8)
    np.savez(tmp_path / "images.npz", images=pixels)
    wanted = data.load_images(DataSpec(str(tmp_path / "images.npz")), preprocess, 3).batch([0]).numpy()
    fields = {name: getattr(preprocess, name) for name in ("mean", "std", "size", "resize")}
    found = run_engine.load_images(tmp_path / "images.npz", json.loads(json.dumps(fields)), wanted.shape)
    assert found.dtype == np.float32
    assert found.flags["C_CONTIGUOUS"]
    np.testing.assert_array_equal(found, wanted)


def test_an_image_file_is_read_as_its_pixels(tmp_path: Path) -> None:
    from PIL import Image

    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    np.save(tmp_path / "image.npy", pixels)
    preprocess = {"mean": [0.5] * 3, "std": [0.5] * 3, "size": None}
    paths = [tmp_path / "image.png", tmp_path / "image.npy"]
    found, wanted = (run_engine.load_images(path, preprocess, (1, 3, 8, 8)) for path in paths)
    np.testing.assert_array_equal(found, wanted)


# ---------------------------------------------------------------- time


def test_times_are_named_as_trtexec_names_them(bundle: Path) -> None:
    done = run(bundle, "--duration", "0.05", "--warmUp", "10")
    assert done.returncode == 0, done.stderr
    head, throughput, latency = done.stdout.splitlines()
    assert head == "=== model.onnx (onnxruntime, fp32, batch 4) ==="
    assert throughput.startswith("Throughput: ")
    names = ("min", "max", "mean", "median", "percentile(90%)", "percentile(95%)", "percentile(99%)")
    assert [part.split(" = ")[0] for part in latency.partition(": ")[2].split(", ")] == list(names)


class Steps:
    """A runner whose samples take the times that it is given, in turn."""

    notes = ()

    def __init__(self, compute_ms: list[float], enqueue_ms: float) -> None:
        self.compute_ms, self.enqueue_ms, self.taken = compute_ms, enqueue_ms, 0

    def sample(self) -> dict[str, float]:
        compute = self.compute_ms[self.taken % len(self.compute_ms)]
        self.taken += 1
        return {run_engine.ENQUEUE: self.enqueue_ms, run_engine.COMPUTE: compute}


def test_at_least_ten_iterations_are_timed_and_none_of_the_warm_up() -> None:
    steps = Steps([1.0], 0.1)
    found = run_engine.measure(steps, warmup_ms=5, duration_s=0)
    assert found["iterations"] == 10
    assert steps.taken > 10
    assert found["figures_ms"]["GPU Compute Time"]["median"] == 1.0
    assert found["remarks"] == []


def test_an_unstable_or_enqueue_bound_gpu_is_warned_of() -> None:
    unstable = run_engine.measure(Steps([1.0, 1.2], 0.1), 0, 0)["remarks"]
    assert unstable == [
        "Warning: GPU Compute Time varies by 9.6% (standard deviation): "
        "lock the clocks, or keep other work off the GPU"
    ]
    (bound,) = run_engine.measure(Steps([1.0], 0.9), 0, 0)["remarks"]
    assert bound.startswith("Warning: Enqueue Time is above 0.8 of GPU Compute Time")


# ---------------------------------------------------------------- refuse

TRIPWIRE = "raise SystemExit('the package was imported')"


@pytest.mark.parametrize("backend", ["tensorrt", "onnxruntime", "openvino", "inductor"])
@pytest.mark.parametrize("fault", ["changed", "unlisted", "gone"])
def test_an_engine_that_is_not_the_manifests_is_refused_before_any_package_is_touched(
    bundle: Path, backend: str, fault: str
) -> None:
    entry = {"precision": "fp32", "backend": backend, "engine": "model.onnx", "source": "model.onnx"}
    write_manifest(bundle, engines=[entry], **({"files": {}} if fault == "unlisted" else {}))
    if fault == "changed":
        with (bundle / "model.onnx").open("ab") as file:
            file.write(b"x")
    elif fault == "gone":
        (bundle / "model.onnx").unlink()
    for name in ("tensorrt", "pycuda", "onnxruntime", "openvino"):
        (bundle / f"{name}.py").write_text(TRIPWIRE, encoding="utf-8")
    done = run(bundle)
    assert done.returncode == 1
    reason = {
        "changed": "it is not the engine that was built, and is not opened",
        "unlisted": "the manifest has no sha256 of it: it is not opened",
        "gone": "cannot be read",
    }
    assert reason[fault] in done.stderr
    assert "imported" not in done.stderr


def test_a_package_that_is_missing_is_named_with_its_mend(bundle: Path) -> None:
    for backend, package in (("tensorrt", "tensorrt"), ("onnxruntime", "onnxruntime"), ("inductor", "torch")):
        entry = {"precision": "fp32", "backend": backend, "engine": "model.onnx", "source": "model.onnx"}
        write_manifest(bundle, engines=[entry])
        done = run(bundle, absent=(package,))
        assert done.returncode == 3
        assert done.stderr.startswith(f"Error: {package} cannot be imported (")
        assert "pip install" in done.stderr


def test_a_user_sees_one_line_for_each_mistake(
    bundle: Path,
    pixels: NDArray[np.uint8],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    np.save(bundle / "floats.npy", pixels / 255.0)
    np.save(bundle / "small.npy", pixels[:, :8])
    (bundle / "text.png").write_text("no image", encoding="utf-8")
    (bundle / "broken.npz").write_bytes(b"PK\x03\x04")
    wrong = {
        ("--precision", "int8"): "has no int8 engine; there are: fp32",
        ("absent.npy",): "absent.npy: holds no image that can be read",
        ("floats.npy",): "images are uint8 (N, H, W, 3)",
        ("small.npy",): "an image is (3, 8, 16), the engine takes (3, 16, 16)",
        ("text.png",): "text.png: holds no image that can be read",
        ("broken.npz",): "broken.npz: holds no image that can be read",
        ("--bundle", "nowhere"): "manifest.json: cannot be used",
    }
    monkeypatch.chdir(bundle)
    for arguments, message in wrong.items():
        folder = () if "--bundle" in arguments else ("--bundle", ".")
        assert run_engine.main([*arguments, *folder]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("Error: ")
        assert message in line


def test_a_broken_engine_is_one_line_and_names_the_mend(bundle: Path) -> None:
    (bundle / "model.onnx").write_bytes(b"no ONNX")
    write_manifest(bundle)
    done = run(bundle)
    assert done.returncode == 4
    (line,) = done.stderr.splitlines()
    assert line.startswith("Error: onnxruntime cannot run model.onnx, built on another machine: ")
    assert line.endswith("; optpipe rebuild builds the bundle's engines anew on this machine")


# ---------------------------------------------------------------- other engines


def test_openvino_runs_the_same_bundle(bundle: Path, pixels: NDArray[np.uint8]) -> None:
    pytest.importorskip("openvino", reason="the package openvino is not installed")
    entry = {"precision": "fp32", "backend": "openvino", "engine": "model.onnx", "source": "model.onnx"}
    write_manifest(bundle, engines=[entry])
    done = run(bundle, "images.npy", "--json", "--duration", "0")
    assert done.returncode == 0, done.stderr
    found = [image["classes"][0] for image in json.loads(done.stdout)["images"]]
    assert found == expected(bundle, pixels).argmax(axis=1).tolist()


ON_A_GPU = """
import onnxruntime

class Options(onnxruntime.SessionOptions):
    def add_session_config_entry(self, key, value):
        assert key != "session.disable_cpu_ep_fallback" or value == "1"
        self.on_gpu_only = getattr(self, "on_gpu_only", False) or key == "session.disable_cpu_ep_fallback"
        if key != "session.disable_cpu_ep_fallback":  # here the CPU computes
            super().add_session_config_entry(key, value)

class Session(onnxruntime.InferenceSession):
    def __init__(self, content, options, providers, enable_fallback):
        assert loaded and options.on_gpu_only and not enable_fallback
        assert providers == [("CUDAExecutionProvider", {"use_tf32": "0"})]
        super().__init__(content, options, providers=["CPUExecutionProvider"])

loaded = []
def preload_dlls():
    print("a library was not found")
    loaded.append(True)

onnxruntime.InferenceSession, onnxruntime.SessionOptions = Session, Options
onnxruntime.preload_dlls = preload_dlls
onnxruntime.get_available_providers = lambda: ["CUDAExecutionProvider"] if loaded else []
"""


def test_on_a_gpu_onnxruntime_gets_cudas_libraries_and_may_not_use_the_cpu(
    bundle: Path, pixels: NDArray[np.uint8]
) -> None:
    manifest = json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))
    write_manifest(bundle, target={**manifest["target"], "device": "cuda"})
    done = run(bundle, "images.npy", "--json", "--duration", "0", before=ON_A_GPU)
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["images"]) == len(pixels)
    assert "a library was not found" in done.stderr


def test_a_provider_that_does_not_load_is_told_from_an_engine_that_does_not_fit(bundle: Path) -> None:
    manifest = json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))
    write_manifest(bundle, target={**manifest["target"], "device": "cuda"})
    before = (
        "import onnxruntime\n"
        "onnxruntime.preload_dlls = lambda: None\n"
        "onnxruntime.get_available_providers = lambda: ['CUDAExecutionProvider']\n"
        # As where CUDA's libraries are missing: ONNX Runtime leaves the provider out and goes on.
        "real = onnxruntime.InferenceSession\n"
        "onnxruntime.InferenceSession = lambda content, options, providers, enable_fallback: real("
        "content, options, enable_fallback=enable_fallback)\n"
    )
    done = run(bundle, before=before)
    assert done.returncode == 3
    assert done.stderr == ("Error: CUDAExecutionProvider does not load: check the driver, CUDA and cuDNN\n")


def test_the_source_is_read_by_python_3_8() -> None:
    ast.parse(SOURCE.read_text(encoding="utf-8"), feature_version=(3, 8))
