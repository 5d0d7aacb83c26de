"""What is known of a network, and what is taken out of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Plan:
    """What is taken out of a network: depth, width, resolution. The empty plan is the original."""

    drop_blocks: tuple[str, ...] = ()
    keep_channels: tuple[tuple[str, tuple[int, ...]], ...] = ()
    input_hw: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True)
class Block:
    """A unit of depth of the traced graph; shapes are (C, H, W) of one image.

    ``kind``: "residual" is what lies between a stream and an add; "dense" a layer whose features are
    concatenated to those before it; "plain" a convolution with its normalisation and activation that keeps
    the shape.
    """

    name: str
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    parameters: int
    macs: int
    droppable: bool
    why_not: str = ""
    kind: Literal["residual", "dense", "plain"] = "residual"


@dataclass(frozen=True, slots=True)
class ChannelGroup:
    """Channels that can only be pruned together; ``shape`` is the weight shape of its first layer."""

    name: str
    layers: tuple[str, ...]
    shape: tuple[int, ...]
    channels: int
    parameters: int
    macs: int
    prunable: bool
    why_not: str = ""


@dataclass(frozen=True, slots=True)
class ModelGraph:
    """What the trace of a network shows, in execution order.

    ``fixed_size`` says why the network takes no smaller image; "" where it does.
    """

    blocks: tuple[Block, ...]
    groups: tuple[ChannelGroup, ...]
    parameters: int
    macs: int
    input_shape: tuple[int, int, int]
    classes: int
    fixed_size: str = ""

    @property
    def droppable(self) -> tuple[Block, ...]:
        """The residual blocks that can be dropped, in execution order."""
        return tuple(block for block in self.units if block.kind == "residual")

    @property
    def units(self) -> tuple[Block, ...]:
        """Whatever can be dropped, of each kind, in execution order."""
        return tuple(block for block in self.blocks if block.droppable)
