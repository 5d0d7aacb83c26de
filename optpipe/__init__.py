"""optpipe makes a trained vision network faster on the device where it will run.

``optpipe.load(run)`` gives the optimized ``nn.Module`` of a finished run back.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

__version__ = "0.1.0"


def load(run: str | Path) -> nn.Module:
    """The optimized network of a finished run, in eval mode with its recovered weights.

    ``run`` is the run's folder or its ``deploy`` folder.

    Raises:
        UsageError: there is no finished run, or a file is not what its manifest says.
    """
    from optpipe import deploy

    return deploy.load(run)
