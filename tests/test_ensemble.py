"""Networks joined to one that knows what it does not know, from torch to the bundle's runner."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from test_run_engine import BATCH, PREPROCESS, SIZE, run, write_manifest
from torch import Tensor, nn

from optpipe import building, onnx_export, uncertainty
from optpipe.backends import onnxruntime
from optpipe.deploy import run_engine
from optpipe.ensemble import OUTPUTS, Answer, Ensemble
from optpipe.errors import RunError
from optpipe.pipeline import ensembles
from optpipe.types import Target

TARGET = Target("onnxruntime", BATCH, (3, SIZE, SIZE), threads=1)


class Net(nn.Module):
    """A small network; ``scale`` makes its logits large."""

    def __init__(self, generator: torch.Generator, scale: float = 1.0) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 5)
        for parameter in self.parameters():
            parameter.data = scale * torch.randn(parameter.shape, generator=generator)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, 5)."""
        logits: Tensor = self.head(torch.relu(self.norm(self.conv(images))).mean((2, 3)))
        return logits


@dataclass(frozen=True)
class Fixed:
    """A set of images without labels."""

    pixels: Tensor
    labels: None = None
    digest: str = ""

    def __len__(self) -> int:
        return len(self.pixels)

    def batch(self, indices: object) -> Tensor:
        return self.pixels[indices]  # type: ignore[index]


@pytest.fixture(scope="module")
def joined() -> Ensemble:
    generator = torch.Generator().manual_seed(0)
    return Ensemble([Net(generator) for _ in range(3)]).eval()


@pytest.fixture(scope="module")
def images() -> Fixed:
    return Fixed(torch.randn(9, *TARGET.input_shape, generator=torch.Generator().manual_seed(1)))


@pytest.fixture(scope="module")
def exported(joined: Ensemble, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ensemble") / run_engine.ENSEMBLE
    onnx_export.export(joined, TARGET.input_shape, BATCH, path, output_names=OUTPUTS)
    return path


def answers(joined: Ensemble, images: Fixed) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    with torch.inference_mode():
        logits, doubt = joined(images.pixels)
    return logits.double().numpy(), doubt.double().numpy()


# ---------------------------------------------------------------- the network


def test_an_ensemble_says_what_the_equations_do(joined: Ensemble, images: Fixed) -> None:
    with torch.inference_mode():
        members = torch.stack([torch.softmax(member(images.pixels), 1) for member in joined.members])
    expected = uncertainty.decompose(members.numpy())
    logits, doubt = answers(joined, images)
    np.testing.assert_allclose(np.exp(logits), expected.mean, atol=1e-6)
    np.testing.assert_allclose(doubt, np.stack([expected.aleatoric, expected.epistemic], 1), atol=1e-5)
    assert expected.epistemic.max() > 0.1


def test_probabilities_too_small_for_float32_leave_all_figures_finite(images: Fixed) -> None:
    generator = torch.Generator().manual_seed(2)
    large = Ensemble([Net(generator, scale=50.0) for _ in range(2)]).eval()
    logits, doubt = answers(large, images)
    assert logits.min() < -200
    assert np.isfinite(logits).all() and np.isfinite(doubt).all()
    assert (doubt >= 0).all() and (doubt.sum(axis=1) <= np.log(5) + 1e-5).all()


def test_one_network_is_its_own_ensemble_and_has_nothing_to_disagree_on(
    joined: Ensemble, images: Fixed
) -> None:
    alone = Ensemble(list(joined.members)[:1]).eval()
    logits, doubt = answers(alone, images)
    with torch.inference_mode():
        expected = torch.log_softmax(alone.members[0](images.pixels), 1)
    np.testing.assert_allclose(logits, expected.numpy(), atol=1e-6)
    np.testing.assert_allclose(doubt[:, 1], 0.0, atol=1e-6)


# ---------------------------------------------------------------- its file


def test_the_file_has_both_outputs_and_any_batch(exported: Path) -> None:
    outputs = onnx.load(exported).graph.output
    assert [output.name for output in outputs] == ["logits", "uncertainty"]
    assert [output.type.tensor_type.shape.dim[0].dim_param for output in outputs] == ["batch", "batch"]
    assert [output.type.tensor_type.shape.dim[1].dim_value for output in outputs] == [5, 2]
    assert {output.type.tensor_type.elem_type for output in outputs} == {onnx.TensorProto.FLOAT}


def test_the_file_computes_what_torch_does(joined: Ensemble, exported: Path, images: Fixed) -> None:
    found = ensembles.differences(joined, exported, TARGET, images)
    assert found is not None
    assert max(found) < 1e-4


def test_a_file_that_computes_something_else_is_refused(exported: Path, images: Fixed) -> None:
    other = Ensemble([Net(torch.Generator().manual_seed(9))]).eval()
    with pytest.raises(RunError, match=r"uncertainty.onnx: its logits differ from torch's by up to .* on 9 "):
        ensembles.differences(other, exported, TARGET, images)


def test_an_engine_has_the_logits_alone(joined: Ensemble, images: Fixed, tmp_path: Path) -> None:
    onnx_export.export(Answer(joined), TARGET.input_shape, BATCH, tmp_path / building.ONNX)
    session = onnxruntime.load(onnxruntime.build(tmp_path / building.ONNX, TARGET, tmp_path), TARGET)
    try:
        found = session.run(images.pixels.numpy())
    finally:
        session.close()
    np.testing.assert_allclose(found, answers(joined, images)[0], atol=1e-4)


# ---------------------------------------------------------------- in the bundle


@pytest.fixture
def bundle(exported: Path, tmp_path: Path) -> Path:
    """A bundle whose engine is the ensemble's file too, with images beside it: more than a batch."""
    for name in ("model.onnx", run_engine.ENSEMBLE):
        (tmp_path / name).write_bytes(exported.read_bytes())
    (tmp_path / "run_engine.py").write_bytes(Path(run_engine.__file__).read_bytes())
    content = exported.read_bytes()
    entry = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    write_manifest(tmp_path, files={"model.onnx": entry, run_engine.ENSEMBLE: entry})
    pixels = np.random.default_rng(0).integers(0, 256, (BATCH + 2, SIZE, SIZE, 3), dtype=np.uint8)
    np.save(tmp_path / "images.npy", pixels)
    return tmp_path


def prepared(bundle: Path) -> Fixed:
    pixels = np.load(bundle / "images.npy").astype(np.float32).transpose(0, 3, 1, 2) / np.float32(255)
    mean, std = (np.array(value, np.float32).reshape(-1, 1, 1) for value in (PREPROCESS.mean, PREPROCESS.std))
    return Fixed(torch.from_numpy((pixels - mean) / std))


def test_the_runner_tells_how_far_each_answer_can_be_trusted(bundle: Path, joined: Ensemble) -> None:
    done = run(bundle, "images.npy", "--uncertainty", "--json")
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)
    logits, doubt = answers(joined, prepared(bundle))
    assert results["engine"] == "uncertainty.onnx"
    assert len(results["images"]) == BATCH + 2
    for image, row, (entropy, information) in zip(results["images"], logits, doubt, strict=True):
        assert image["classes"][0] == row.argmax()
        assert image["probabilities"][0] == pytest.approx(np.exp(row.max()), abs=1e-5)
        assert image["expected_entropy"] == pytest.approx(entropy, abs=1e-4)
        assert image["mutual_information"] == pytest.approx(information, abs=1e-4)


def test_a_line_for_each_image_is_printed(bundle: Path, joined: Ensemble) -> None:
    done = run(bundle, "images.npy", "--uncertainty")
    assert done.returncode == 0, done.stderr
    logits, doubt = answers(joined, prepared(bundle))
    lines = done.stdout.splitlines()
    assert len(lines) == BATCH + 2
    assert lines[0].startswith(
        f"Image 0: class {logits[0].argmax()} ({np.exp(logits[0].max()):.1%}), expected "
    )
    assert lines[0].endswith(f", mutual information {doubt[0, 1]:.4f} nats")


def test_without_images_or_an_ensemble_or_with_another_file_the_runner_ends_in_one_line(bundle: Path) -> None:
    for arguments, code, message in (
        (("--uncertainty",), 2, "Error: --uncertainty: name an image, or an .npy or .npz of uint8 pixels\n"),
        (("images.npy", "--uncertainty"), 1, "it is not the engine that was built, and is not opened\n"),
    ):
        if code == 1:
            (bundle / run_engine.ENSEMBLE).write_bytes(b"another")
        done = run(bundle, *arguments)
        assert (done.returncode, done.stdout) == (code, "")
        assert done.stderr.endswith(message) and done.stderr.count("\n") == 1
    write_manifest(bundle)
    done = run(bundle, "images.npy", "--uncertainty")
    assert done.returncode == 2
    assert done.stderr.endswith("has no uncertainty.onnx: the recipe must have [export] uncertainty = true\n")
