"""What torch keeps of an export for as long as the process lives, let go of.

A process that exports thousands of networks, as a service or a long sweep does, would grow without end: by
a quarter of a megabyte for each export of the smallest network, by the text of its code for each traced one.
"""

from __future__ import annotations

import linecache
from collections.abc import Iterator

import torch
from torch.export import ExportedProgram


def forget(program: ExportedProgram | None = None) -> None:
    """Let go of what torch keeps of exported programs, of ``program`` above all, which serves no more.

    None of it is public. What another version of torch does not have is left out, and a test that measures
    the growth tells.
    """
    shapes = torch.fx.experimental.symbolic_shapes
    for environment in _environments(program):
        # They hold sizes that hold the environment, and this by way of C++, where no collector follows.
        (getattr(environment, "tracked_fakes", None) or []).clear()
    for member in vars(shapes.ShapeEnv).values():
        if hasattr(member, "cache_clear"):
            member.cache_clear()
    # The text of generated code, for tracebacks, of networks that are long gone too.
    texts = getattr(getattr(torch.fx.graph_module, "_loader", None), "eval_cache", {})
    for name in texts:
        linecache.cache.pop(name, None)
    texts.clear()


def _environments(
    program: ExportedProgram | None,
) -> Iterator[torch.fx.experimental.symbolic_shapes.ShapeEnv]:
    """Those that a program's sizes were worked out in, some of them twice."""
    for node in () if program is None else program.graph.nodes:
        mode = getattr(node.meta.get("val"), "fake_mode", None)
        if mode is not None and mode.shape_env is not None:
            yield mode.shape_env
