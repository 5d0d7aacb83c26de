"""How images are made from a network alone."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Synthesis:
    """Settings of DeepInversion (Yin et al., 2020, Eqs 2-4 and 8); the weights are the paper's alphas.

    ``steps`` are those of Adam for one batch of at most ``batch`` images, ``lr`` its rate, which falls to 0
    along a cosine. ``tv``, ``l2``, ``statistics`` and ``competition`` weigh the terms beside the
    cross-entropy, which has weight 1.

    ``competition`` is 0 unless asked for. The paper competes with a student that learns from the images as
    they are made; here they are made before anything is pruned, so what stands in for the student is the
    original without its cheapest droppable block, not trained, whose disagreement is a weaker guide.
    """

    steps: int = 1000
    lr: float = 0.1
    batch: int = 125
    tv: float = 1e-3
    l2: float = 1e-4
    statistics: float = 1.0
    competition: float = 0.0
