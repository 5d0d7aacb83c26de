"""What a program holds in memory, as files that a run can refer to: images and a network's weights.

Files are named by their contents, so that the same inputs give the same recipe and other inputs another.
"""

from __future__ import annotations

import copy
import hashlib
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from optpipe import data, files, models, store
from optpipe.errors import UsageError

if TYPE_CHECKING:
    from torch import nn

Images = NDArray[np.uint8] | str | Path
Labels = NDArray[np.integer] | Sequence[int]

WRAPPERS = {
    "DataParallel": "model.module",
    "DistributedDataParallel": "model.module",
    "OptimizedModule": "model._orig_mod",
}
"""Modules that hold a network and cannot be traced, and how to have what they hold."""

TOLERANCE = 1e-4
"""How far, as a share of the largest, logits of one network computed in two ways may be apart."""


def checked_images(name: str, images: Images, labels: Labels | None) -> str:
    """The source that an argument names, or the argument's own name for an array.

    Raises:
        UsageError: it is neither uint8 images nor a source, or the labels do not go with it.
    """
    if isinstance(images, str | Path):
        if labels is not None:
            raise UsageError(f"labels of {name}: {images} is no array; it has labels of its own, or none")
        return str(images)
    if not isinstance(images, np.ndarray):
        raise UsageError(
            f"{name} is a {type(images).__name__}; give a uint8 array (N, H, W, C), a folder, or an .npz"
        )
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or not images.size:
        raise UsageError(
            f"{name} is {images.dtype} of shape {images.shape}; images are uint8, 0 to 255, of shape "
            "(N, H, W, C) or (N, H, W)"
        )
    if labels is not None:
        found = np.asarray(labels)
        if not np.issubdtype(found.dtype, np.integer) or found.shape != images.shape[:1]:
            raise UsageError(
                f"labels of {name} are {found.dtype} of shape {found.shape}; they must be integers of shape "
                f"({len(images)},)"
            )
    return name


def written_images(folder: Path, name: str, images: NDArray[np.uint8], labels: Labels | None) -> str:
    """The path of an .npz file that holds the images and labels; one that is there is not written again."""
    arrays: dict[str, NDArray[np.generic]] = {"images": np.ascontiguousarray(images)}
    if labels is not None:
        arrays["labels"] = np.asarray(labels, dtype=np.int64)
    digest = hashlib.sha256()
    for key, array in arrays.items():
        digest.update(f"{key} {array.shape}\n".encode())
        digest.update(array.tobytes())
    path = folder / f"{name}-{digest.hexdigest()[:16]}.npz"
    if not path.exists():
        content = io.BytesIO()
        np.savez(content, **arrays)  # type: ignore[arg-type]
        files.write_atomically(path, content.getvalue())
    return str(path)


def count_images(spec: data.DataSpec, channels: int, search_folder: Path) -> int:
    """How many images a source has, or are wanted of it."""
    there = len(data.open_source(spec, channels, search_folder).names) - spec.skip
    return there if spec.count is None else min(spec.count, there)


def copied(module: nn.Module) -> nn.Module:
    """A copy of a program's network, on the CPU and in eval mode.

    Raises:
        UsageError: it is no network, one in a wrapper, or its weights are not fp32.
    """
    from torch import nn

    kind = type(module).__name__
    if not isinstance(module, nn.Module):
        raise UsageError(f"model is a {kind}; give a torch.nn.Module, or the name of a network")
    if kind in WRAPPERS:
        raise UsageError(f"model is a {kind}; give the network in it: {WRAPPERS[kind]}")
    for name, tensor in module.state_dict().items():
        if tensor.is_floating_point() and str(tensor.dtype) != "torch.float32":
            raise UsageError(
                f"model: {name} is {tensor.dtype}; give the network in fp32: optpipe makes the other "
                "precisions of it"
            )
    return copy.deepcopy(module).cpu().eval()


def written_weights(folder: Path, module: nn.Module) -> str:
    """The path of a safetensors file that holds a network's weights."""
    path = folder / f"weights-{models.weights_digest(module)[:16]}.safetensors"
    if not path.exists():
        store.save_tensors(path, module.state_dict())
    return str(path)


def check_same(name: str, named: nn.Module, module: nn.Module, images: data.ImageSet) -> None:
    """UsageError where the architecture of a name, with a module's weights, computes something else."""
    import torch

    batch = images.batch(slice(0, 4))
    with torch.inference_mode():
        expected, found = module(batch), named(batch)
    if isinstance(expected, torch.Tensor) and expected.shape == found.shape:
        apart = float((expected - found).abs().max() / expected.abs().max().clamp_min(1e-12))
        if apart <= TOLERANCE:
            return
        what = f"their logits differ by up to {apart:.2g} of the largest"
    else:
        what = "their outputs have other shapes"
    raise UsageError(
        f'architecture = "{name}": with the weights of the given module it computes something else ({what}); '
        "name the function that made the module, or give no architecture"
    )
