"""Which units of depth add least to what a linear classifier can tell."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING, cast

from optpipe import graph
from optpipe.methods.three_d.images import Split
from optpipe.types import Answer, Request, Scene, Step, StepResult

if TYPE_CHECKING:
    from torch import fx


def probe(
    scene: Scene, network: fx.GraphModule, digest: str, names: Sequence[str], parts: Split
) -> Generator[Sequence[Request], Sequence[Answer], tuple[graph.UnitScore, ...]]:
    """The discrimination of these units of a network (Section 3.3), the least important first.

    They are ordered by the skill that a probe gains, where the paper takes its accuracy: with the accuracy of
    few images many units are equal, and where the network knows its images by heart all the last ones are.
    ``digest`` is that of the network's weights.
    """
    scored = scene.validation if parts.score == "validation" else scene.calibration
    assert scored is not None
    score = range(len(scored)) if parts.score == "validation" else parts.score

    def work() -> tuple[float, ...]:
        found = graph.unit_discrimination(
            network,
            scene.calibration,
            parts.fit,
            score,
            scene.graph.input_shape,
            scored_on=scene.validation if parts.score == "validation" else None,
            device=scene.device,
            autocast=scene.native_bf16,
        )
        of = {one.name: one for one in found}
        chosen = [of[name] for name in names]
        return tuple(
            value for one in chosen for value in (one.before, one.after, one.skill_before, one.skill_after)
        )

    depends = f"discrimination 2, {digest}, {names}, {parts}, {scored.digest}, bf16 {scene.native_bf16}"
    (answer,) = yield [Step(f"probes of {len(names)} blocks", depends, work)]
    values = cast(StepResult, answer).values
    scores = [
        graph.UnitScore(name, *values[first : first + 4])
        for name, first in zip(names, range(0, len(values), 4), strict=True)
    ]
    return tuple(sorted(scores, key=lambda one: one.gain))
