"""optpipe makes a trained vision network faster on the device where it will run.

``optpipe.load(run)`` gives the optimized ``nn.Module`` of a finished run back, ``optpipe.preprocess(run)``
the function that prepares its images.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor, nn

__version__ = "0.1.0"


def load(run: str | Path) -> nn.Module:
    """The optimized network of a finished run, in eval mode with its recovered weights.

    ``run`` is the run's folder or its ``deploy`` folder. The network takes float32 images (N, C, h, w) of the
    resolution that the run came to, which may be below the original's; :func:`preprocess` prepares them.

    Raises:
        UsageError: there is no finished run, or a file is not what its manifest says.
    """
    from optpipe import deploy

    return deploy.load(run)


def preprocess(run: str | Path) -> Callable[[NDArray[np.uint8] | Sequence[NDArray[np.uint8]]], Tensor]:
    """A function that prepares images for the network of :func:`load`, as the run prepared its own.

    It takes one uint8 image (H, W, C) and gives float32 (C, h, w), or several (a sequence of them or an
    array (N, H, W, C)) and gives (N, C, h, w). It raises UsageError for anything else.

    Raises:
        UsageError: there is no finished run.
    """
    from optpipe import deploy

    return deploy.preprocess(run)
