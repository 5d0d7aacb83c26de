"""A process that exports network after network does not grow."""

from __future__ import annotations

import gc
import linecache
import logging
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from optpipe import graph, leftovers, onnx_export, program_export

SHAPE = (3, 8, 8)


def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    ).eval()


def held() -> tuple[int, int, int]:
    """Worlds of sizes, texts of code, and objects of any kind."""
    gc.collect()
    objects = gc.get_objects()
    texts = sum(name.startswith("<eval_with_key>") for name in linecache.cache)
    return sum(type(one) is ShapeEnv for one in objects), texts, len(objects)


@pytest.mark.parametrize("export", [onnx_export.export, program_export.export], ids=["onnx", "program"])
def test_an_export_leaves_nothing_in_memory(
    export: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert callable(export)
    # The test's own log keeps every line of torch's, with all that it tells of.
    monkeypatch.setattr(logging.root.manager, "disable", logging.CRITICAL)

    def once() -> None:
        export(graph.trace(network(), SHAPE), SHAPE, 2, tmp_path / "network")

    for _ in range(2):  # the first ones fill caches that do not grow further
        once()
    environments, texts, objects = held()
    for _ in range(3):
        once()
    later = held()
    assert later[0] <= environments
    assert later[1] <= texts
    assert later[2] - objects < 600  # three of 1,050 each, were they kept


def test_an_export_that_was_forgotten_still_computes() -> None:
    given = network()
    program = torch.export.export(given, (torch.zeros(2, *SHAPE),))
    leftovers.forget(program)
    images = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(program.module()(images), given(images))
