"""Candidates that are trained on the way: their weights, and what these score."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from optpipe import data, graph, store, timing, tune
from optpipe.errors import UsageError
from optpipe.lab.ground import Ground
from optpipe.lab.nesting import begin
from optpipe.lab.subject import Origin, refuse_other_size
from optpipe.lab.teaching import teachers_of
from optpipe.types import Quality, Train, Trained

if TYPE_CHECKING:
    from torch import fx


@dataclass(frozen=True, slots=True)
class TrainedRecord:
    """What trained.json holds: the quality of the weights beside it, as long as they have that sha256."""

    weights_sha256: str
    quality: Quality


class Trainings:
    """Trains a candidate once; its weights stay with the run, for whoever goes on from them."""

    def __init__(self, ground: Ground) -> None:
        self._ground = ground

    def awaited(self, request: Train) -> bool:
        """Whether its weights, or the score that is wanted of them, are not there yet."""
        key = self._key(self._resolved(request))
        unscored = (
            request.score is not None
            and self._ground.run.answer("trials", key, "trained.json", TrainedRecord) is None
        )
        return unscored or self._ground.kept(key) == "computed"

    def compute(self, request: Train) -> None:
        """Put its weights and score into the store."""
        self.answer(request)

    def answer(self, request: Train) -> tuple[Trained, Origin]:
        """The trained candidate, trained now unless its weights are there."""
        ground, request = self._ground, self._resolved(request)
        key, watch = self._key(request), timing.Stopwatch()
        origin = ground.kept(key)
        if origin != "computed":
            candidate = graph.apply(ground.subject.original, request.plan, ground.shape)
            store.load_tensors(candidate, ground.run.weights(key))
        else:
            candidate = self._begin(request)
            self._carry_out(request, candidate, key)
        digest = store.file_sha256(ground.lend(key))
        measured = self._scored(request, key, candidate, digest)
        return Trained(key, candidate, digest, measured, watch.seconds), origin

    def _resolved(self, request: Train) -> Train:
        return replace(request, tune=tune.on_this_machine(request.tune, self._ground.device))

    def _key(self, request: Train) -> str:
        return self._ground.key("train", request, self._ground.device, *self._scored_by(request))

    def _begin(self, request: Train) -> fx.GraphModule:
        """The request's candidate before its training."""
        ground = self._ground
        begun, left = begin(ground.subject.original, request.start, request.plan, ground.shape, ground.run)
        return graph.apply(begun, left, ground.shape)

    def _carry_out(self, request: Train, candidate: fx.GraphModule, key: str) -> None:
        """Train the candidate in place and store its weights."""
        ground = self._ground
        if request.tune.loss != "labels":
            refuse_other_size(request.plan, ground.shape, request.tune.loss)
        images = ground.resolutions.images(request.plan)
        if request.images is not None:
            images = data.part(images, request.images)
        tune.train(
            candidate,
            ground.subject.original,
            images,
            request.tune,
            seed=ground.subject.seed,
            checkpoint=ground.checkpoint(key),
            emit=ground.emit,
            device=ground.device,
            teachers=self._teachers(request),
        )
        ground.keep(key, candidate.state_dict())

    def _teachers(self, request: Train) -> tune.Teachers | None:
        """What the request's images are taught by, from the bank that all trainings of the run share."""
        ground = self._ground
        folder = ground.run.trial_folder(ground.key("teacher", request.tune.autocast, ground.device))
        return teachers_of(request.tune, request.images, ground.subject, folder, ground.device, ground.emit)

    def _scored_by(self, request: Train) -> tuple[str, ...]:
        """What a request's score depends on beside the calibration images: the validation images' digest."""
        if request.score != "validation":
            return ()
        validation = self._ground.subject.validation
        if validation is None:
            raise UsageError(
                "a score on validation images is wanted, and there are none; give [data] validation"
            )
        return (validation.digest,)

    def _scored(self, request: Train, key: str, network: fx.GraphModule, digest: str) -> Quality | None:
        """The network's quality where it is wanted, from trained.json where that is of its weights."""
        if request.score is None:
            return None
        run = self._ground.run
        stored = run.answer("trials", key, "trained.json", TrainedRecord)
        if stored is not None and stored[0].weights_sha256 == digest:
            return stored[0].quality
        measured = self._ground.quality(network, request.plan, request.score)
        run.store_answer("trials", key, "trained.json", TrainedRecord(digest, measured))
        return measured
