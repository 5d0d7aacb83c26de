"""A finished run, as Python programs see it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from optpipe import deploy
from optpipe.data import Pixels
from optpipe.deploy.bundle import open_bundle
from optpipe.report import markdown, schema

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True)
class Result:
    """A finished run; printed, it is the summary with which the command line ends.

    ``folder`` holds all that the run left, ``report`` is its report.json: fractions from 0 to 1,
    milliseconds a batch. ``original`` is the live module that a run was made from, where no name makes it
    again.
    """

    folder: Path
    report: schema.Report = field(repr=False)
    original: nn.Module | None = field(default=None, repr=False, compare=False)

    @cached_property
    def model(self) -> nn.Module:
        """The optimized network in eval mode, loaded when it is first asked for, the same one each time."""
        return deploy.load(self.folder, self.original)

    @property
    def preprocess(self) -> Callable[[Pixels | Sequence[Pixels]], Tensor]:
        """The function that prepares images for ``model``: :func:`optpipe.preprocess`."""
        return deploy.preprocess(self.folder)

    @property
    def onnx(self) -> Path:
        """The optimized network as ONNX, in fp32."""
        return self.folder / "deploy" / "model.onnx"

    @property
    def engine(self) -> Path:
        """The engine that the budget was held against, at the target's precision.

        ONNX Runtime's is an ONNX file.
        """
        folder, manifest = open_bundle(self.folder)
        precision = self.report.target.precision
        return folder / next(one.engine for one in manifest.engines if one.precision == precision)

    def __str__(self) -> str:
        return "\n".join(markdown.summary(self.report, str(self.folder)))
