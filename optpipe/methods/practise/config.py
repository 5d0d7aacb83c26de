"""The settings of PRACTISE."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Criterion = Literal["recoverability", "l2", "curl", "epsilon_resnet", "random", "first"]


@dataclass(frozen=True, slots=True)
class Config:
    """The keys of ``[method]``.

    ``criterion``: what a block is scored by; low goes first (:mod:`~optpipe.methods.practise.scores`).
    ``scorer``, of recoverability alone: "exact" trains adaptors for ``exact_steps`` as the paper does, "fast"
    fits the block's substitute and a map after every later block in closed form, on ``fast_images`` images
    (``optpipe.graph.refit_errors``).

    ``select``: "greedy" scores the blocks once. "joint" scores those that remain anew after each drop, beside
    what is gone, and builds greedy's set too, so that the report can say what that gained.
    """

    scorer: Literal["fast", "exact"] = "fast"
    exact_steps: int = 1000
    fast_images: int = 128
    criterion: Criterion = "recoverability"
    select: Literal["greedy", "joint"] = "greedy"
