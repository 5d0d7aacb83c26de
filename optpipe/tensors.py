"""Tensors on the disk: weights and checkpoints, whole and with their digest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from optpipe import seals
from optpipe.errors import RunError, UsageError
from optpipe.files import write_atomically

if TYPE_CHECKING:
    import torch
    from torch import nn


@dataclass(frozen=True, slots=True)
class DiskCheckpoint:
    """A training checkpoint in one safetensors file, replaced atomically every ``every`` steps."""

    path: Path
    every: int

    def load(self) -> dict[str, torch.Tensor] | None:
        """The last complete checkpoint; None where there is none, or it is damaged."""
        try:
            return seals.read_tensors(self.path)
        except (FileNotFoundError, seals.DamagedError):
            return None
        except OSError as error:
            raise RunError(
                f"{self.path}: cannot be read: {error.strerror}; remove it and run again"
            ) from None

    def save(self, state: Mapping[str, torch.Tensor]) -> None:
        """Replace the checkpoint."""
        save_tensors(self.path, state)


def save_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write tensors as safetensors with their digest, atomically; equal tensors give equal bytes.

    Raises:
        RunError: the disk is full or the folder cannot be written.
    """
    import torch
    from safetensors.torch import save

    # Copies, since safetensors refuses tensors that share memory (tied weights); and its own writing to a
    # file reports a full disk as an error in the tensors.
    copies = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }
    write_atomically(path, save(copies, {seals.METADATA: seals.tensors_sha256(copies)}))


def load_tensors(model: nn.Module, path: Path, part: str = "") -> None:
    """Fill a network of the same structure from safetensors, in place.

    With ``part`` from those tensors alone whose names begin so; their names in the network come after it.

    Raises:
        UsageError: the file is missing or damaged, or its keys or shapes are another network's.
    """
    try:
        tensors = seals.read_tensors(path)
        named = {name[len(part) :]: value for name, value in tensors.items() if name.startswith(part)}
        model.load_state_dict(named)
    except (OSError, seals.DamagedError) as error:
        raise UsageError(f"{path}: cannot be read: {error}") from None
    except RuntimeError as error:
        first = " ".join(str(error).split())[:200]
        raise UsageError(f"{path}: does not fit the network: {first}") from None
