"""What ``optpipe inspect`` shows: a network's blocks and channel groups. Nothing is run or written."""

from __future__ import annotations

from collections.abc import Sequence

from optpipe import data, graph, models, store
from optpipe.recipe import Recipe
from optpipe.types import Block, ChannelGroup, ModelGraph


def inspect_recipe(recipe: Recipe) -> ModelGraph:
    """The graph of a recipe's network at the recipe's input size."""
    model = models.load_model(recipe.model, recipe.folder)
    channels = models.input_channels(model)
    data.check_preprocess(recipe.data.preprocess, channels)
    size = recipe.data.preprocess.size
    if size is None:
        images = data.load_images(recipe.data.calibration, recipe.data.preprocess, channels, recipe.folder)
        size = images.shape[1:]
    return graph.inspect(model, (channels, *size))


def as_json(shown: ModelGraph) -> str:
    """The graph as JSON."""
    return store.to_json(shown)


def as_text(shown: ModelGraph) -> str:
    """The graph as aligned columns."""
    blocks: list[tuple[str, ...]] = [("block", "kind", "input", "output", "parameters", "MACs", "droppable")]
    blocks += [_block_row(block) for block in shown.blocks]
    groups: list[tuple[str, ...]] = [
        ("channel group", "layers", "channels", "weight", "parameters", "MACs", "prunable")
    ]
    groups += [_group_row(group) for group in shown.groups]
    total = (
        f"input {_shape(shown.input_shape)}, {shown.classes} classes, {shown.parameters:,} parameters, "
        f"{shown.macs:,} MACs; {len(shown.units)} of {len(shown.blocks)} blocks droppable"
    )
    size = ["", f"takes no smaller image: {shown.fixed_size}"] if shown.fixed_size else []
    return "\n".join([total, "", *_columns(blocks), "", *_columns(groups), *size]) + "\n"


def _block_row(block: Block) -> tuple[str, ...]:
    return (
        block.name,
        block.kind,
        _shape(block.input_shape),
        _shape(block.output_shape),
        f"{block.parameters:,}",
        f"{block.macs:,}",
        "yes" if block.droppable else f"no: {block.why_not}",
    )


def _group_row(group: ChannelGroup) -> tuple[str, ...]:
    return (
        group.name,
        str(len(group.layers)),
        str(group.channels),
        _shape(group.shape),
        f"{group.parameters:,}",
        f"{group.macs:,}",
        "yes" if group.prunable else f"no: {group.why_not}",
    )


def _shape(shape: Sequence[int]) -> str:
    return "x".join(str(size) for size in shape)


def _columns(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
