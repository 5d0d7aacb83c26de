"""Distribution-lossless pruning with uncertainty (Wang et al., "Efficient Stein Variational Inference for
Reliable Distribution-lossless Network Pruning").

What is optimised. A unit g, a filter or a weight w_g, belongs to the network (the slab) with probability
theta_g, else to the spike at zero:

    p(Y | X, Theta, d)  the labels given the predictions, d learnt                                     (9)
    p(Theta | lambda, epsilon, Phi) =
        prod_g theta_g N(w_g; 0, lambda^-2) + (1 - theta_g) N(w_g; 0, epsilon^-2)                     (10)
    p(Theta | Y, X)  proportional to their product                                                    (11)
    J = E over X, Phi [ CE(f(Theta), Y) + beta KL(q || p(Theta | Y, X)) ]                             (13)

N particles (networks with gates, Algorithm 1) stand for q; E over Phi is taken by masks sampled from the
gates; the KL term is descended along Stein's direction (Eqs 14 and 15). The densities are in
:mod:`~optpipe.methods.dllp.prior`, the masks in :mod:`~optpipe.methods.dllp.concrete`, the direction in
:mod:`~optpipe.methods.dllp.stein`, and the gradient as it is followed, with what this deviates in, in
:mod:`~optpipe.methods.dllp.objective`. Each says which equation a line is.

From theta to a network. Nothing in Eqs 9 to 13 prefers a small network, so that structures have a prior that
falls with their cost, weighted so that the expected cost comes down to the budget
(:mod:`~optpipe.methods.dllp.pressure`). Thresholds on theta then give a nested family of networks; each that
is tried is built and timed, and the largest that meets the budget is taken
(:mod:`~optpipe.methods.dllp.family`). The last share ``settle`` of the training goes on with its masks fixed,
as if the temperature were zero: the units that stay are then those of an engine that was timed, and nothing
is left in the spike for the cut to take out. No recovery follows, unless ``[recover]`` asks for one.
"""

from __future__ import annotations

from optpipe.methods.dllp.checks import check
from optpipe.methods.dllp.config import Config
from optpipe.methods.dllp.filters import narrowed
from optpipe.methods.dllp.training import frame_of
from optpipe.methods.dllp.weights import thinned
from optpipe.types import Scene, Search, Tune

__all__ = ["NEEDS_LABELS", "RECOVER", "Config", "check", "search"]

NEEDS_LABELS = True

RECOVER = Tune(
    steps=0,
    batch=128,
    lr=0.01,
    nesterov=True,
    weight_decay=5e-4,
    schedule="cosine",
    loss="labels",
    trainable="all",
    augment="shift",
    autocast="auto",
)


def search(scene: Scene, config: Config) -> Search:
    """Learn which units the network needs, take the largest network that meets the budget, and settle it.

    Raises:
        UsageError: what :func:`check` refuses, or a latency that the original meets already.
        RunError: no network of the family meets the budget; says what can be reached.
    """
    check(scene.graph, scene.calibration, scene.budget, config, scene.recover, scene.validation)
    frame = frame_of(scene, config)
    if config.granularity == "filter":
        return (yield from narrowed(frame))
    return (yield from thinned(frame))
