"""Named steps of a search: what is slow and is no candidate."""

from __future__ import annotations

from optpipe import timing, tune
from optpipe.lab.ground import Ground
from optpipe.lab.subject import Origin
from optpipe.types import Step, StepResult


class Steps:
    """Carries out a step once, and keeps its values."""

    def __init__(self, ground: Ground) -> None:
        self._ground = ground

    def awaited(self, step: Step) -> bool:
        """Whether its values are not in the store yet."""
        return self._stored(step) is None

    def compute(self, step: Step) -> None:
        """Put its values into the store."""
        self.answer(step)

    def answer(self, step: Step) -> tuple[StepResult, Origin]:
        """Its values, computed now unless they are there."""
        stored = self._stored(step)
        if stored is not None:
            return stored[0], "cached" if stored[1] else "reused"
        watch = timing.Stopwatch()
        values = step.function()
        tune.release(self._ground.device)
        result = StepResult(self._key(step), step.name, values, watch.seconds)
        self._ground.run.store_answer("trials", result.key, "step.json", result)
        return result, "computed"

    def _stored(self, step: Step) -> tuple[StepResult, bool] | None:
        return self._ground.run.answer("trials", self._key(step), "step.json", StepResult)

    def _key(self, step: Step) -> str:
        return self._ground.key("step", step.name, step.depends)
