"""Where a training runs and what its hardware computes natively."""

from __future__ import annotations

import copy
import dataclasses
from typing import TypeVar

import torch
from torch import nn

from optpipe.errors import MissingError
from optpipe.types import Tune

T = TypeVar("T", bound=nn.Module)


def training_device(device: str, trainer: str = "target", *, elsewhere: bool = False) -> str:
    """Where to train for a target's device: on the GPU where torch can use it, else on the CPU.

    ``trainer`` names another than the target's own: "cpu" or "cuda". With ``elsewhere`` it is other machines
    that train, and what is asked for need not be here.

    Raises:
        MissingError: a GPU is asked for, and torch can use none.
    """
    if trainer == "cuda" and elsewhere:
        return "cuda"
    if trainer == "cuda" and not torch.cuda.is_available():
        raise MissingError(
            '[run] trainer = "cuda": torch finds no GPU that it can use here; see `optpipe doctor --gpu`, or '
            'take trainer = "cpu"'
        )
    wanted = device if trainer == "target" else trainer
    return "cuda" if wanted == "cuda" and torch.cuda.is_available() else "cpu"


def usable(device: str) -> str:
    """The device itself where torch can use it here, else the CPU."""
    return "cuda" if device == "cuda" and torch.cuda.is_available() else "cpu"


def on_this_machine(tune: Tune, device: str = "cpu") -> Tune:
    """``tune`` with ``autocast = "auto"`` resolved: bfloat16 where the hardware has instructions for it."""
    if tune.autocast != "auto":
        return tune
    return dataclasses.replace(tune, autocast="bf16" if native_bf16(device) else "off")


def native_bf16(device: str) -> bool:
    """Whether the hardware has instructions for bfloat16; a GPU that is elsewhere is taken to have them."""
    if device == "cuda" and not torch.cuda.is_available():
        return True
    if device == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def release(device: str) -> None:
    """Give the memory that torch keeps in reserve back to the device, where an engine is to be built next."""
    if device == "cuda":
        torch.cuda.empty_cache()


def there(network: T, device: str) -> T:
    """The network itself on the CPU, a copy of it on another device: the caller's stays where it is."""
    return network if device == "cpu" else copy.deepcopy(network).to(device)
