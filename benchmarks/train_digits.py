"""Make what optpipe ships: the handwritten digits in three disjoint sets, and the network that reads them.

    python benchmarks/train_digits.py            write the data, train, write the weights and manifests
    python benchmarks/train_digits.py --check    compare the shipped files with a regenerated split and
                                                 the manifests; exit code 1 where they differ

Needs scikit-learn, whose copy of the data is the source. Training is bit-reproducible on one machine
with one version of torch; another machine rounds differently and ends with other weights.
"""

from __future__ import annotations

import hashlib
import io
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors.torch import save
from torch import Tensor, nn

from optpipe import zoo
from optpipe.data import DataSpec, ImageSet, Preprocess, load_images

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "calibration_data"
WEIGHTS = ROOT / "recipes" / "weights"
NETWORK = "resnet20_digits.safetensors"

SPLIT_SEED = 20
TRAIN_SEED = 0
CALIBRATION_A_CLASS = 20
EVALUATION_A_CLASS = 55
PREPROCESS = Preprocess(mean=(0.5,), std=(0.5,), size=(32, 32))
EPOCHS = 30
BATCH = 64
THREADS = 2


@dataclass(frozen=True, slots=True)
class Digits:
    """``images`` uint8 (N, 8, 8), ``labels`` uint8 (N,)."""

    images: NDArray[np.uint8]
    labels: NDArray[np.uint8]

    def npz(self) -> bytes:
        """The bytes of an .npz file; uncompressed, so that they do not depend on zlib's version."""
        buffer = io.BytesIO()
        np.savez(buffer, images=self.images, labels=self.labels)
        return buffer.getvalue()


# ---------------------------------------------------------------- data


def split_digits(seed: int) -> dict[str, Digits]:
    """The digits by file name, each image in one set only, each class alike in the two smaller sets."""
    from sklearn.datasets import load_digits

    source = load_digits()
    images = np.round(source.images * (255 / 16)).astype(np.uint8)
    # A drawing that occurs twice could fall into two sets.
    _, first = np.unique(images.reshape(len(images), -1), axis=0, return_index=True)
    generator = np.random.default_rng(seed)
    chosen: dict[str, list[int]] = {"calibration": [], "evaluation": [], "train": []}
    for label in range(10):
        members = generator.permutation(first[source.target[first] == label])
        ends = [CALIBRATION_A_CLASS, CALIBRATION_A_CLASS + EVALUATION_A_CLASS]
        for split, part in zip(chosen, np.split(members, ends), strict=True):
            chosen[split].extend(part.tolist())
    sets = {}
    for split, members_of_split in chosen.items():
        order = generator.permutation(members_of_split)
        sets[f"digits_{split}.npz"] = Digits(images[order], source.target[order].astype(np.uint8))
    return sets


def data_manifest(sets: dict[str, Digits]) -> str:
    """What ``calibration_data`` holds, as JSON."""
    return _json(
        {
            "what": "Handwritten digits, 8x8 grey images, 10 classes",
            "source": "scikit-learn's load_digits: the test set of the UCI Machine Learning Repository's "
            "'Optical Recognition of Handwritten Digits' (E. Alpaydin and C. Kaynak, 1998)",
            "url": "https://doi.org/10.24432/C50P49",
            "licence": "CC BY 4.0",
            "changes": "grey levels 0..16 scaled to 0..255; split into three disjoint sets",
            "command": "python benchmarks/train_digits.py",
            "split_seed": SPLIT_SEED,
            "files": {
                name: {
                    "sha256": hashlib.sha256(digits.npz()).hexdigest(),
                    "images": len(digits.images),
                    "images_a_class": np.bincount(digits.labels, minlength=10).tolist(),
                }
                for name, digits in sorted(sets.items())
            },
        }
    )


# ---------------------------------------------------------------- training


def train(images: ImageSet, seed: int) -> nn.Module:
    """ResNet-20 trained from scratch by SGD with a one-cycle rate; the last weights, none picked."""
    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(THREADS)
    generator = torch.Generator().manual_seed(seed)
    model = zoo.build("resnet20_cifar", classes=10, in_channels=1).train()
    assert images.labels is not None
    steps = len(images) // BATCH
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=EPOCHS * steps)
    for epoch in range(EPOCHS):
        begin, total = time.monotonic(), 0.0
        order = torch.randperm(len(images), generator=generator)[: steps * BATCH]
        for chosen in order.view(steps, BATCH):
            logits = model(augment(images.batch(chosen.tolist()), generator))
            loss = F.cross_entropy(logits, images.labels[chosen])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
            total += loss.item()
        took = time.monotonic() - begin
        click.echo(f"epoch {epoch + 1}/{EPOCHS}: loss {total / steps:.4f}, {took:.1f} s", err=True)
    return model.eval()


def augment(x: Tensor, generator: torch.Generator) -> Tensor:
    """Each image turned by up to 10 degrees, scaled by up to 10% and moved by up to 6% of its size."""
    turn, scale, right, down = (torch.rand(4, len(x), generator=generator) * 2 - 1).unbind()
    angle, scale = turn * (torch.pi / 18), 1 + 0.1 * scale
    rows = torch.stack(
        [
            torch.stack([scale * angle.cos(), -scale * angle.sin(), 0.12 * right], dim=1),
            torch.stack([scale * angle.sin(), scale * angle.cos(), 0.12 * down], dim=1),
        ],
        dim=1,
    )
    grid = F.affine_grid(rows, list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, padding_mode="border", align_corners=False)


def accuracy(model: nn.Module, images: ImageSet) -> float:
    """Top-1, from 0 to 1."""
    assert images.labels is not None
    with torch.no_grad():
        predicted = model(images.batch(slice(None))).argmax(dim=1)
    return float((predicted == images.labels).double().mean())


def load(name: str) -> ImageSet:
    """One of the shipped sets at the network's resolution."""
    return load_images(DataSpec(name), PREPROCESS, 1, DATA, classes=10)


def weights_manifest(weights: bytes, top1: float, count: int) -> str:
    """What ``recipes/weights`` holds, as JSON."""
    return _json(
        {
            "what": "zoo:resnet20_cifar with 1 input channel and 10 classes, trained on digits_train.npz",
            "command": "python benchmarks/train_digits.py",
            "licence": "Apache-2.0, as the rest of this repository",
            "seed": TRAIN_SEED,
            "torch": torch.__version__.partition("+")[0],
            "input": {"size": PREPROCESS.size, "mean": PREPROCESS.mean, "std": PREPROCESS.std},
            "files": {NETWORK: {"sha256": hashlib.sha256(weights).hexdigest()}},
            "evaluation": {"file": "digits_evaluation.npz", "images": count, "top1": round(top1, 4)},
        }
    )


# ---------------------------------------------------------------- command


def check() -> list[str]:
    """What differs between the shipped files, the manifests and a regenerated split."""
    sets = split_digits(SPLIT_SEED)
    problems = [
        f"calibration_data/{name} is not what the split gives"
        for name, digits in sets.items()
        if (DATA / name).read_bytes() != digits.npz()
    ]
    if (DATA / "manifest.json").read_text(encoding="utf-8") != data_manifest(sets):
        problems.append("calibration_data/manifest.json is not what the split gives")
    manifest = json.loads((WEIGHTS / "manifest.json").read_text(encoding="utf-8"))
    for name, entry in manifest["files"].items():
        if hashlib.sha256((WEIGHTS / name).read_bytes()).hexdigest() != entry["sha256"]:
            problems.append(f"recipes/weights/{name} is not what its manifest says")
    return problems


def _json(content: object) -> str:
    return json.dumps(content, indent=2) + "\n"


@click.command()
@click.option("--check", "only_check", is_flag=True, help="Compare the shipped files; write nothing.")
def main(only_check: bool) -> None:
    """Write the shipped digits, train the shipped network on them, and write its weights and manifests."""
    if only_check:
        problems = check()
        click.echo("\n".join(problems) or "data and weights are as the manifests say")
        sys.exit(1 if problems else 0)
    sets = split_digits(SPLIT_SEED)
    for name, digits in sets.items():
        (DATA / name).write_bytes(digits.npz())
    (DATA / "manifest.json").write_text(data_manifest(sets), encoding="utf-8")
    model = train(load("digits_train.npz"), TRAIN_SEED)
    evaluation = load("digits_evaluation.npz")
    top1 = accuracy(model, evaluation)
    weights = save({name: tensor.contiguous() for name, tensor in model.state_dict().items()})
    WEIGHTS.mkdir(parents=True, exist_ok=True)
    (WEIGHTS / NETWORK).write_bytes(weights)
    (WEIGHTS / "manifest.json").write_text(weights_manifest(weights, top1, len(evaluation)), encoding="utf-8")
    click.echo(f"top-1 {top1:.2%} of {len(evaluation)} evaluation images; weights and manifest in {WEIGHTS}")


if __name__ == "__main__":
    main()
