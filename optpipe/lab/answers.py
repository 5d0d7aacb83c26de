"""The laboratory: one answer to each request, computed once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from optpipe import building, store, timing
from optpipe.lab.engines import Engines
from optpipe.lab.fits import Fits
from optpipe.lab.ground import Ground
from optpipe.lab.names import candidate_of, request_name
from optpipe.lab.pool import Pool, hand_over
from optpipe.lab.steps import Steps
from optpipe.lab.subject import Clock, Origin, Resolutions, Subject
from optpipe.lab.trainings import Trainings
from optpipe.lab.trials import Trials
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
    Plan,
    Quality,
    Request,
    Step,
    Train,
    Trained,
    Trial,
)


class Room(Protocol):
    """Answers requests of one kind."""

    def awaited(self, request: Any) -> bool:
        """Whether a request takes long, and its answer is not in the store yet."""

    def compute(self, request: Any) -> None:
        """Put an answer into the store, but for a latency."""

    def answer(self, request: Any) -> tuple[Answer, Origin]:
        """The answer, from the store where it is there."""


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
        device: str = "cpu",
        checkpoint_every: int = 50,
        pool: Pool | None = None,
        measured_by: Fingerprint | None = None,
    ) -> None:
        """``epoch`` counts how often the baseline drifted; latencies of another epoch are not reused.

        ``device`` trains and scores. ``checkpoint_every`` is how many steps a candidate trains between two
        checkpoints. A ``pool`` answers what can be answered elsewhere, latencies never. With ``measured_by``
        nothing is timed here, as in :class:`~optpipe.lab.engines.Engines`.
        """
        ground = Ground(
            run,
            subject,
            shape=bench.target.input_shape,
            device=device,
            emit=emit,
            checkpoint_every=checkpoint_every,
            resolutions=Resolutions(subject.calibration),
            validation=None if subject.validation is None else Resolutions(subject.validation),
        )
        self._engines = Engines(
            run, subject, ground.resolutions, bench, clock, epoch, emit, measured_by=measured_by
        )
        self._rooms: Mapping[type, Room] = {
            Step: Steps(ground),
            Train: Trainings(ground),
            Fit: Fits(ground),
            Ask: Trials(ground, self._engines),
        }
        self._emit = emit
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
        if self._pool is not None:
            awaited = [self._rooms[type(request)].awaited(request) for request in requests]
            hand_over(self._pool, self._batches, requests, awaited, self._emit)
        self._batches += 1
        for number, request in enumerate(requests, start=1):
            watch = timing.Stopwatch()
            name = request_name(request)
            self._emit(Event("begin", name, "", number, len(requests)))
            answer, origin = self._rooms[type(request)].answer(request)
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
        self._rooms[type(request)].compute(request)

    def _remember(self, request: Request, answer: Answer) -> None:
        """Keep what the report shows of a candidate."""
        if isinstance(answer, Trial) and answer.latency is not None:
            self._timed[answer.ask.plan] = answer
        if isinstance(request, Ask | Train) and isinstance(answer, Trial | Trained) and answer.quality:
            self._scores[request.plan] = answer.quality
