"""What is known of a network, and what is taken out of it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Plan:
    """What is taken out of a network: depth, width, resolution. The empty plan is the original."""

    drop_blocks: tuple[str, ...] = ()
    keep_channels: tuple[tuple[str, tuple[int, ...]], ...] = ()
    input_hw: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True)
class Block:
    """A residual block of the traced graph; shapes are (C, H, W) of one image."""

    name: str
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    parameters: int
    macs: int
    droppable: bool
    why_not: str = ""


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
    """What the trace of a network shows, in execution order."""

    blocks: tuple[Block, ...]
    groups: tuple[ChannelGroup, ...]
    parameters: int
    macs: int
    input_shape: tuple[int, int, int]
    classes: int

    @property
    def droppable(self) -> tuple[Block, ...]:
        """The blocks that can be dropped, in execution order."""
        return tuple(block for block in self.blocks if block.droppable)
