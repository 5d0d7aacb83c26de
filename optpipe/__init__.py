"""optpipe makes a trained vision network faster on the device where it will run.

``optpipe.run(recipe)`` is the command ``optpipe run``; ``optpipe.optimize(model, images, ...)`` does the same
for a network and images that are in memory. Either gives a :class:`~optpipe.api.Result`.
``optpipe.load(run)`` gives the optimized ``nn.Module`` of a finished run back, ``optpipe.preprocess(run)``
the function that prepares its images. What goes wrong is an :class:`OptpipeError` of one line.

Importing this is light: torch and numpy come in with the first call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from optpipe.errors import GateError, MissingError, OptpipeError, RunError, UsageError
from optpipe.version import __version__

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor, nn

    from optpipe.api import Result, optimize, run
else:

    def __getattr__(name: str) -> object:
        """What imports numpy is imported when it is first asked for."""
        if name not in __all__:
            raise AttributeError(f"module 'optpipe' has no attribute {name!r}")
        from optpipe import api

        return getattr(api, name)

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})


__all__ = [
    "GateError",
    "MissingError",
    "OptpipeError",
    "Result",
    "RunError",
    "UsageError",
    "__version__",
    "load",
    "optimize",
    "preprocess",
    "run",
]


def load(run: str | Path, model: nn.Module | None = None) -> nn.Module:
    """The optimized network of a finished run, in eval mode with its recovered weights.

    ``run`` is the run's folder or its ``deploy`` folder. The network takes float32 images (N, C, h, w) of the
    resolution that the run came to, which may be below the original's; :func:`preprocess` prepares them.

    ``model`` is the original architecture, whatever its weights, where no name makes it again: after
    :func:`optimize` of a live module without ``architecture``. It is left as it is.

    Raises:
        UsageError: there is no finished run, a file is not what its manifest says, or the architecture is
            needed, or is another.
    """
    from optpipe import deploy

    return deploy.load(run, model)


def preprocess(run: str | Path) -> Callable[[NDArray[np.uint8] | Sequence[NDArray[np.uint8]]], Tensor]:
    """A function that prepares images for the network of :func:`load`, as the run prepared its own.

    It takes one uint8 image (H, W, C) and gives float32 (C, h, w), or several (a sequence of them or an
    array (N, H, W, C)) and gives (N, C, h, w). It raises UsageError for anything else.

    Raises:
        UsageError: there is no finished run.
    """
    from optpipe import deploy

    return deploy.preprocess(run)
