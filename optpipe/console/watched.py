"""What a run's events say of where it is, and how much longer that takes."""

from __future__ import annotations

from dataclasses import dataclass, field

from optpipe.types import Event


@dataclass(frozen=True, slots=True)
class Saving:
    """The latest measured latency as a fraction of the original's, and its 95% interval."""

    name: str
    ratio: float
    ci95: tuple[float, float]


@dataclass(frozen=True, slots=True)
class Left:
    """Seconds that are still to come in this stage; ``bound`` where more may follow that nobody knows yet."""

    seconds: float
    bound: bool


@dataclass(frozen=True, slots=True)
class Bar:
    """Work that counts its steps; ``from_done`` were done at ``since``, when it was first heard of."""

    name: str
    detail: str
    done: int
    total: int
    since: float
    from_done: int
    now: float

    @property
    def left_s(self) -> float | None:
        """Seconds left at the rate seen so far; None before there is one."""
        steps, seconds = self.done - self.from_done, self.now - self.since
        return (self.total - self.done) * seconds / steps if steps > 0 else None


@dataclass(slots=True)
class Watched:
    """Where a run is: its stages, the batch of candidates in work, the steps of a training.

    All times are seconds of one clock, which the caller reads. ``stage`` is the stage that is running or
    was the last, by its number from 1; 0 before the first.
    """

    began: float
    stage: int = 0
    stages: int = 0
    name: str = ""
    running: bool = False
    candidate: str = ""
    number: int = 0
    of: int = 0
    saving: Saving | None = None
    bar: Bar | None = None
    _candidate_began: float = 0.0
    _computed_s: list[float] = field(default_factory=list)

    @property
    def begun(self) -> bool:
        """Whether there is anything to show yet."""
        return self.stage > 0 or self.bar is not None or self.of > 0

    def see(self, event: Event, now: float) -> None:
        """Take an event in."""
        if event.kind == "stage":
            self.stage, self.stages, self.name = event.done or 0, event.total or 0, event.name
            self.running = event.detail == "started"
            self.candidate, self.number, self.of, self.bar = "", 0, 0, None
            self._computed_s = []
        elif event.kind == "begin":
            self.candidate, self.number, self.of = event.name, event.done or 0, event.total or 0
            self.bar, self._candidate_began = None, now
            if self.number == 1:
                self._computed_s = []
        elif event.kind == "trial":
            self.candidate, self.number, self.of = event.name, event.done or 0, event.total or 0
            if event.detail == "computed" and event.seconds is not None:
                self._computed_s.append(event.seconds)
        elif event.kind == "progress":
            self._advance(event, now)
        self.saving = _saving(event) or self.saving

    def _advance(self, event: Event, now: float) -> None:
        if not event.total or event.done is None:
            return
        old = self.bar
        goes_on = old is not None and (old.name, old.total) == (event.name, event.total)
        if old is not None and goes_on and event.done >= old.done:
            since, from_done = old.since, old.from_done
        else:
            since, from_done = now, event.done
        self.bar = Bar(event.name, event.detail, event.done, event.total, since, from_done, now)

    def left(self, now: float) -> Left | None:
        """How much longer this stage takes: by the rate of the training or of the batch; None if unknown.

        A search may ask for more than the batch in work, so that only the recovery's own training is the
        whole of what is left of its stage. Commands without stages do one thing.
        """
        training = None if self.bar is None else self.bar.left_s
        if self.name == "recover" and self.bar is not None and self.bar.name == "training":
            return None if training is None else Left(training, bound=False)
        known = [seconds for seconds in (training, self._batch_left(now)) if seconds is not None]
        if not known or (self.stage and not self.running):
            return None
        return Left(max(known), bound=self.stage > 0)

    def _batch_left(self, now: float) -> float | None:
        """For the candidates of this batch, at the mean time of those that were computed in it."""
        if not self._computed_s or not self.of:
            return None
        mean = sum(self._computed_s) / len(self._computed_s)
        current = max(mean - (now - self._candidate_began), 0.0)
        return current + mean * (self.of - self.number)


def _saving(event: Event) -> Saving | None:
    fields = dict(event.fields)
    ratio, low, high = (fields.get(key) for key in ("ratio", "ratio_low", "ratio_high"))
    if isinstance(ratio, float) and isinstance(low, float) and isinstance(high, float):
        return Saving(event.name if event.kind == "trial" else event.detail, ratio, (low, high))
    return None
