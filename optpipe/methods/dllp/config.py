"""The settings of distribution-lossless pruning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from optpipe.graph import Granularity
from optpipe.methods.dllp.stein import Kernel


@dataclass(frozen=True, slots=True)
class Config:
    """The keys of ``[method]``.

    ``granularity``: what a unit is, a filter (a channel group's), a weight, or 2:4, weights of which each
    four along the input channels keep two. ``score``: "posterior" is the method; "magnitude" ranks units by
    their weights' size instead, and trains what is left for as long. ``start``: "pretrained" begins with the
    model's weights, "scratch" with new ones.

    ``epochs`` of batches of ``batch`` at a rate that falls from ``lr`` to 0 along a cosine, by SGD with
    ``momentum``. ``augment`` and ``autocast`` are as in ``[recover]``. The last share
    ``settle`` of them trains the units that stay, their masks fixed: the limit of temperature zero. 0 ends
    with the last sampled masks, as the paper does.

    ``particles`` networks follow Stein's direction, whose weight against the task is ``beta``; ``kernel``
    says over what its kernels span and how wide they are. ``spike`` is epsilon of Eq. 10, an inverse
    standard deviation. ``temperature`` of the masks falls from the first value to the second. ``jitter`` is
    how far the particles begin apart, over each tensor's root mean square.

    ``keep`` is the probability theta at the start, ``travel`` how far its logit would come in a training in
    which all gradients agree. ``sharpen`` is the factor that log-odds have by the end of the gates' training,
    where masks are then nearly certain.

    ``cost``: what presses units out of a network with a latency budget: "measured" is the latency of each
    channel count, "macs" their MACs. ``builds``: how many networks of the nested family are built at most
    before one is chosen. ``histograms``: of how many layers the report shows the weights; of all by 0.
    """

    granularity: Granularity = "filter"
    score: Literal["posterior", "magnitude"] = "posterior"
    start: Literal["pretrained", "scratch"] = "pretrained"
    epochs: float = 60.0
    settle: float = 0.5
    batch: int = 512
    lr: float = 0.1
    momentum: float = 0.9
    augment: Literal["none", "resized_crop", "shift", "shift_color"] = "shift"
    autocast: Literal["auto", "off", "bf16"] = "auto"
    particles: int = 2
    beta: float = 0.1
    kernel: Kernel = "median"
    spike: float = 1e3
    temperature: tuple[float, float] = (1.0, 0.1)
    keep: float = 0.95
    travel: float = 40.0
    sharpen: float = 8.0
    jitter: float = 0.01
    cost: Literal["measured", "macs"] = "measured"
    builds: int = 12
    histograms: int = 6
