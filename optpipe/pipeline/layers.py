"""How long each layer takes, in the original's engine and in the result's."""

from __future__ import annotations

from optpipe import timing
from optpipe.errors import OptpipeError
from optpipe.types import Backend, Engine, Latency, LayerTimer, LayerTimes, Target

WANTED_MS = 1000.0
REPEATS = 5, 50
"""At least and at most; between them, as many as take about a second without the telling."""


def times(
    backend: Backend, original: tuple[Engine, Target], result: tuple[Engine, Target], slower: Latency
) -> LayerTimes:
    """Ask the backend about both engines; ``slower`` is the latency of the slower one.

    What cannot be told fails no run: the reason takes the place of the layers.
    """
    if not isinstance(backend, LayerTimer):
        name = original[1].backend
        return LayerTimes((), (), 0, f"{name} does not tell: what it compiles to are no layers any more")
    repeats = min(max(int(WANTED_MS / slower.median_ms), REPEATS[0]), REPEATS[1])
    try:
        with timing.device_lock(original[1].device):
            first, second = (backend.layer_times(*one, repeats) for one in (original, result))
    except OptpipeError as error:
        return LayerTimes((), (), 0, str(error))
    if not first or not second:
        where = f"{original[1].backend} on {original[1].device!r}"
        return LayerTimes((), (), 0, f"{where} does not tell how long a layer takes")
    return LayerTimes(first, second, repeats)
