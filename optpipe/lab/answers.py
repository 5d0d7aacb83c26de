"""The laboratory: one answer to each request, computed once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from optpipe import building, data, graph, quality, store, timing, tune
from optpipe.errors import UsageError
from optpipe.lab.engines import Engines
from optpipe.lab.names import candidate_of, plan_name, request_name
from optpipe.lab.nesting import begin
from optpipe.lab.pool import Pool
from optpipe.lab.subject import KEY_VERSION, Clock, Origin, Resolutions, Subject, refuse_other_size
from optpipe.lab.teaching import teachers_of
from optpipe.types import (
    Answer,
    Ask,
    Candidate,
    Cell,
    Emit,
    EngineCount,
    Event,
    Fingerprint,
    Fit,
    Fitted,
    Plan,
    Quality,
    Request,
    Step,
    StepResult,
    Train,
    Trained,
    Trial,
)

if TYPE_CHECKING:
    from torch import fx


@dataclass(frozen=True, slots=True)
class TrialRecord:
    """What trial.json holds; the latency is stored with the engine, which other trials may share."""

    ask: Ask
    parameters: int
    macs: int
    quality: Quality | None
    distance: float | None
    seconds: float


@dataclass(frozen=True, slots=True)
class TrainedRecord:
    """What trained.json holds: the quality of the weights beside it, as long as they have that sha256."""

    weights_sha256: str
    quality: Quality


class Lab:
    """One run's laboratory: keeps the baseline's engine open and answers requests one by one.

    Latencies are those of the whole chain: export, engine, paired timing against the baseline. They depend
    on structure and target alone, so trials of equal structure share one engine. What a search may learn
    about accuracy comes from calibration images, or from the recipe's validation images, at the resolution of
    each plan; evaluation images never get here.
    """

    def __init__(
        self,
        run: store.Run,
        subject: Subject,
        bench: building.Workbench,
        clock: Clock,
        epoch: int,
        emit: Emit,
        *,
        checkpoint_every: int = 50,
        pool: Pool | None = None,
        measured_by: Fingerprint | None = None,
    ) -> None:
        """``epoch`` counts how often the baseline drifted; latencies of another epoch are not reused.

        ``checkpoint_every`` is how many steps a candidate trains between two checkpoints. A ``pool`` answers
        what can be answered elsewhere, latencies never. With ``measured_by`` nothing is timed here, as in
        :class:`~optpipe.lab.engines.Engines`.
        """
        self._run = run
        self._subject = subject
        self._shape = bench.target.input_shape
        self._device = tune.training_device(bench.target.device)
        self._emit = emit
        self._checkpoint_every = checkpoint_every
        self._resolutions = Resolutions(subject.calibration)
        self._validation = None if subject.validation is None else Resolutions(subject.validation)
        self._engines = Engines(
            run, subject, self._resolutions, bench, clock, epoch, emit, measured_by=measured_by
        )
        self._pool = pool
        self._batches = 0
        self._timed: dict[Plan, Trial] = {}
        self._scores: dict[Plan, Quality] = {}

    def close(self) -> None:
        """Release the baseline's engine."""
        self._engines.close()

    @property
    def engines(self) -> EngineCount:
        """Where the latencies answered so far came from; the same after a replay."""
        return self._engines.count

    def candidates(self, chosen: Plan) -> tuple[Candidate, ...]:
        """Every plan whose latency was asked for, once, in that order; the same after a replay.

        With its quality as it was last measured, by the trial or by a training of the same plan.
        """
        return tuple(
            candidate_of(plan, trial, self._scores.get(plan), chosen=plan == chosen)
            for plan, trial in self._timed.items()
        )

    def answer(self, requests: Sequence[Request]) -> list[Answer]:
        """Answers in the order of the requests, from the store where they are there."""
        answers: list[Answer] = []
        self._hand_over(self._batches, requests)
        self._batches += 1
        for number, request in enumerate(requests, start=1):
            watch = timing.Stopwatch()
            name = request_name(request)
            self._emit(Event("begin", name, "", number, len(requests)))
            if isinstance(request, Step):
                answer, origin = self._step(request)
            elif isinstance(request, Train):
                answer, origin = self._train(request)
            elif isinstance(request, Fit):
                answer, origin = self._fit(request)
            else:
                answer, origin = self._trial(request)
            answers.append(answer)
            self._remember(request, answer)
            latency = answer.latency if isinstance(answer, Trial) else None
            fields: tuple[tuple[str, Cell], ...] = (
                ("key", answer.key),
                *(() if latency is None else latency.fields),
            )
            self._emit(Event("trial", name, origin, number, len(requests), watch.seconds, fields))
        return answers

    def compute(self, request: Request) -> None:
        """Put an answer into the store, but for a latency."""
        if isinstance(request, Step):
            self._step(request)
        elif isinstance(request, Train):
            self._train(request)
        elif isinstance(request, Fit):
            self._fit(request)
        else:
            self._examined(request)

    def _hand_over(self, batch: int, requests: Sequence[Request]) -> None:
        """Have the pool answer what is slow and not stored yet."""
        if self._pool is None:
            return
        wanted = [place for place, request in enumerate(requests) if self._awaited(request)]
        if len(wanted) < self._pool.least:
            return
        count, answered = len(wanted), 0
        self._emit(Event("note", "workers", f"{count} requests are handed over"))

        def done(place: int, worker: str) -> None:
            nonlocal answered
            answered += 1
            name = request_name(requests[place])
            self._emit(Event("trial", name, f"computed by {worker}", answered, count))

        self._pool.compute(batch, wanted, done)

    def _awaited(self, request: Request) -> bool:
        """Whether a request takes long, and its answer is not in the store yet."""
        if isinstance(request, Step):
            key = self._key("step", request.name, request.depends)
            return self._run.answer("trials", key, "step.json", StepResult) is None
        if isinstance(request, Train):
            key = self._train_key(self._resolved(request))
            unscored = (
                request.score is not None
                and self._run.answer("trials", key, "trained.json", TrainedRecord) is None
            )
            return unscored or self._kept(key, self._run.weights(key)) == "computed"
        if isinstance(request, Fit):
            key = self._fit_key(request)
            return self._kept(key, self._run.weights(key)) == "computed"
        slow = request.tune is not None or set(request.wants) != {"latency"}
        key = self._key("trial", request, self._device)
        return slow and self._run.answer("trials", key, "trial.json", TrialRecord) is None

    def _remember(self, request: Request, answer: Answer) -> None:
        """Keep what the report shows of a candidate."""
        if isinstance(answer, Trial) and answer.latency is not None:
            self._timed[answer.ask.plan] = answer
        if isinstance(request, Ask | Train) and isinstance(answer, Trial | Trained) and answer.quality:
            self._scores[request.plan] = answer.quality

    # ------------------------------------------------------------ steps

    def _step(self, step: Step) -> tuple[Answer, Origin]:
        key = self._key("step", step.name, step.depends)
        stored = self._run.answer("trials", key, "step.json", StepResult)
        if stored is not None:
            return stored[0], "cached" if stored[1] else "reused"
        watch = timing.Stopwatch()
        values = step.function()
        tune.release(self._device)
        result = StepResult(key, step.name, values, watch.seconds)
        self._run.store_answer("trials", key, "step.json", result)
        return result, "computed"

    def _key(self, kind: str, *depends: object) -> str:
        subject = self._subject
        return store.digest(
            KEY_VERSION, kind, subject.model_digest, subject.calibration.digest, subject.seed, *depends
        )

    # ------------------------------------------------------------ trainings

    def _train(self, request: Train) -> tuple[Answer, Origin]:
        """A trained candidate; its weights stay with the run, for whoever goes on from them."""
        request = self._resolved(request)
        key = self._train_key(request)
        watch = timing.Stopwatch()
        path = self._run.weights(key)
        origin = self._kept(key, path)
        if origin != "computed":
            candidate = graph.apply(self._subject.original, request.plan, self._shape)
            store.load_tensors(candidate, path)
        else:
            candidate = self._begin(request)
            self._carry_out(request, candidate, path)
        self._run.lend("trained", f"{key}.safetensors", path)  # a worker may have trained it
        digest = store.file_sha256(path)
        measured = self._scored(request, key, candidate, digest)
        return Trained(key, candidate, digest, measured, watch.seconds), origin

    def _resolved(self, request: Train) -> Train:
        return replace(request, tune=tune.on_this_machine(request.tune, self._device))

    def _train_key(self, request: Train) -> str:
        return self._key("train", request, self._device, *self._scored_by(request))

    def _kept(self, key: str, path: Path) -> Origin:
        """Whether weights are the run's own already, come from another run of a sweep, or must be trained."""
        if path.exists():
            return "reused"
        return "cached" if self._run.borrow("trained", f"{key}.safetensors", path) else "computed"

    def _begin(self, request: Train) -> fx.GraphModule:
        """The request's candidate before its training."""
        begun, left = begin(self._subject.original, request.start, request.plan, self._shape, self._run)
        return graph.apply(begun, left, self._shape)

    def _carry_out(self, request: Train, candidate: fx.GraphModule, path: Path) -> None:
        """Train the candidate in place and store its weights."""
        if request.tune.loss != "labels":
            refuse_other_size(request.plan, self._shape, request.tune.loss)
        images = self._resolutions.images(request.plan)
        if request.images is not None:
            images = data.part(images, request.images)
        checkpoint = path.with_name("checkpoint.safetensors")
        tune.train(
            candidate,
            self._subject.original,
            images,
            request.tune,
            seed=self._subject.seed,
            checkpoint=store.DiskCheckpoint(checkpoint, self._checkpoint_every),
            emit=self._emit,
            device=self._device,
            teachers=self._teachers(request),
        )
        store.save_tensors(path, candidate.state_dict())
        checkpoint.unlink(missing_ok=True)
        tune.release(self._device)

    def _teachers(self, request: Train) -> tune.Teachers | None:
        """What the request's images are taught by, from the bank that all trainings of the run share."""
        folder = self._run.trial_folder(self._key("teacher", request.tune.autocast, self._device))
        return teachers_of(request.tune, request.images, self._subject, folder, self._device, self._emit)

    def _scored_by(self, request: Train) -> tuple[str, ...]:
        """What a request's score depends on beside the calibration images: the validation images' digest."""
        if request.score != "validation":
            return ()
        if self._subject.validation is None:
            raise UsageError(
                "a score on validation images is wanted, and there are none; give [data] validation"
            )
        return (self._subject.validation.digest,)

    def _scored(self, request: Train, key: str, network: fx.GraphModule, digest: str) -> Quality | None:
        """The network's quality where it is wanted, from trained.json where that is of its weights."""
        if request.score is None:
            return None
        stored = self._run.answer("trials", key, "trained.json", TrainedRecord)
        if stored is not None and stored[0].weights_sha256 == digest:
            return stored[0].quality
        measured = self._quality(network, request.plan, request.score)
        self._run.store_answer("trials", key, "trained.json", TrainedRecord(digest, measured))
        return measured

    def _quality(
        self,
        network: fx.GraphModule,
        plan: Plan,
        score: tuple[int, ...] | Literal["validation"] | None = None,
    ) -> Quality:
        """How well a plan's network does on images of its size.

        They are all calibration images, those at the indices ``score``, or the validation images.
        """
        split = "calibration"
        images, originals = self._resolutions.images(plan), self._subject.calibration
        if score == "validation":
            assert self._validation is not None and self._subject.validation is not None
            split = "validation"
            images, originals = self._validation.images(plan), self._subject.validation
        elif score is not None:
            images, originals = data.part(images, score), data.part(originals, score)
        own = tune.logits(network, images, self._device, emit=self._emit).numpy()
        if images.labels is not None:
            # What the original says is asked for only where there are no labels.
            return quality.score(own, images.labels.numpy(), own, split)
        reference = tune.logits(self._subject.original, originals, self._device, emit=self._emit).numpy()
        return quality.agreement(own, reference, split)

    def _fit(self, request: Fit) -> tuple[Answer, Origin]:
        """What a method makes and trains itself; its weights stay with the run."""
        tuning = tune.on_this_machine(request.tune, self._device)
        key = self._fit_key(request)
        watch = timing.Stopwatch()
        path = self._run.weights(key)
        origin = self._kept(key, path)
        module, objective = request.make()
        if origin != "computed":
            store.load_tensors(module, path)
        else:
            checkpoint = path.with_name("checkpoint.safetensors")
            if tuning.steps:
                tune.fit(
                    module,
                    objective,
                    self._subject.calibration,
                    tuning,
                    seed=self._subject.seed,
                    checkpoint=store.DiskCheckpoint(checkpoint, self._checkpoint_every),
                    emit=self._emit,
                    device=self._device,
                )
            store.save_tensors(path, module.state_dict())
            checkpoint.unlink(missing_ok=True)
            tune.release(self._device)
        self._run.lend("trained", f"{key}.safetensors", path)
        module.eval().requires_grad_(False)
        return Fitted(key, module, store.file_sha256(path), watch.seconds), origin

    def _fit_key(self, request: Fit) -> str:
        tuning = tune.on_this_machine(request.tune, self._device)
        return self._key("fit", request.name, request.depends, tuning, self._device)

    # ------------------------------------------------------------ trials

    def _trial(self, ask: Ask) -> tuple[Answer, Origin]:
        key, record, origin = self._examined(ask)
        latency = None
        if "latency" in ask.wants:
            latency, timed = self._engines.latency(ask.plan)
            origin = timed if timed == "computed" else origin
        trial = Trial(
            key, ask, record.parameters, record.macs, latency, record.quality, record.distance, record.seconds
        )
        return trial, origin

    def _examined(self, ask: Ask) -> tuple[str, TrialRecord, Origin]:
        """A trial's key and all that it says without an engine."""
        # Training on another device rounds otherwise.
        key = self._key("trial", ask, self._device)
        stored = self._run.answer("trials", key, "trial.json", TrialRecord)
        if stored is not None:
            return key, stored[0], "cached" if stored[1] else "reused"
        record = self._examine(key, ask)
        self._run.store_answer("trials", key, "trial.json", record)
        return key, record, "computed"

    def _examine(self, key: str, ask: Ask) -> TrialRecord:
        """All that a trial can say without an engine: its size, and after tuning, its errors."""
        subject = self._subject
        self._refuse_other_size(ask)
        watch = timing.Stopwatch()
        candidate = graph.apply(subject.original, ask.plan, self._shape)
        parameters, macs = graph.count(candidate, self._resolutions.shape(ask.plan))
        if ask.tune is not None:
            candidate = self._tuned(candidate, ask, self._run.trial_folder(key))
        distance = None
        if "distance" in ask.wants:
            distance = tune.distance(candidate, subject.original, subject.calibration, self._device)
        measured = self._quality(candidate, ask.plan) if "quality" in ask.wants else None
        return TrialRecord(ask, parameters, macs, measured, distance, watch.seconds)

    def _refuse_other_size(self, ask: Ask) -> None:
        """UsageError where features are to be compared with the original's, and are of another size."""
        if ask.tune is not None and ask.tune.loss != "labels":
            refuse_other_size(ask.plan, self._shape, ask.tune.loss)
        shape = self._resolutions.shape(ask.plan)
        if "distance" in ask.wants and shape != self._shape:
            raise UsageError(
                f"{plan_name(ask.plan)}: features of images of {shape[1]}x{shape[2]} have no distance to the "
                f"original's, which takes {self._shape[1]}x{self._shape[2]}; ask for quality"
            )

    def _tuned(self, candidate: fx.GraphModule, ask: Ask, folder: Path) -> fx.GraphModule:
        assert ask.tune is not None
        subject = self._subject
        adapted = ask.tune.trainable == "adaptors"
        if adapted:
            candidate = graph.with_adaptors(subject.original, ask.plan, self._shape)
            if not graph.adaptors(candidate):
                return candidate
        tune.train(
            candidate,
            subject.original,
            self._resolutions.images(ask.plan),
            ask.tune,
            seed=subject.seed,
            emit=self._emit,
            device=self._device,
        )
        if adapted:
            candidate = graph.fold(candidate)
        store.save_tensors(folder / store.WEIGHTS, candidate.state_dict())
        return candidate
