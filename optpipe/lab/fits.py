"""What a method makes and trains itself, such as a posterior."""

from __future__ import annotations

from optpipe import store, timing, tune
from optpipe.lab.ground import Ground
from optpipe.lab.subject import Origin
from optpipe.types import Fit, Fitted, Tune


class Fits:
    """Trains a method's own module once; its weights stay with the run."""

    def __init__(self, ground: Ground) -> None:
        self._ground = ground

    def awaited(self, request: Fit) -> bool:
        """Whether its weights are not there yet."""
        return self._ground.kept(self._key(request)) == "computed"

    def compute(self, request: Fit) -> None:
        """Put its weights into the store."""
        self.answer(request)

    def answer(self, request: Fit) -> tuple[Fitted, Origin]:
        """The module, trained now unless its weights are there."""
        ground, key, watch = self._ground, self._key(request), timing.Stopwatch()
        origin = ground.kept(key)
        module, objective = request.make()
        if origin != "computed":
            store.load_tensors(module, ground.run.weights(key))
        else:
            tuning = self._tuning(request)
            if tuning.steps:
                tune.fit(
                    module,
                    objective,
                    ground.subject.calibration,
                    tuning,
                    seed=ground.subject.seed,
                    checkpoint=ground.checkpoint(key),
                    emit=ground.emit,
                    device=ground.device,
                )
            ground.keep(key, module.state_dict())
        path = ground.lend(key)
        module.eval().requires_grad_(False)
        return Fitted(key, module, store.file_sha256(path), watch.seconds), origin

    def _tuning(self, request: Fit) -> Tune:
        return tune.on_this_machine(request.tune, self._ground.device)

    def _key(self, request: Fit) -> str:
        ground = self._ground
        return ground.key("fit", request.name, request.depends, self._tuning(request), ground.device)
