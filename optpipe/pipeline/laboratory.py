"""What a search is driven with: the lab that answers it, and the scene that it looks at."""

from __future__ import annotations

from optpipe import store, tune
from optpipe.lab import Clock, Lab, Pool, Subject
from optpipe.preparation import Setup
from optpipe.results import Ingested
from optpipe.types import Emit, Fingerprint, Scene


def laboratory(
    setup: Setup,
    opened: store.Run,
    ingested: Ingested,
    emit: Emit,
    *,
    pool: Pool | None = None,
    measured_by: Fingerprint | None = None,
) -> tuple[Lab, Scene]:
    """The lab and the scene of a run; the same for whoever replays its search.

    With ``measured_by`` the lab times nothing, and reads what such a machine has timed.
    """
    recipe = setup.recipe
    subject = Subject(
        setup.original, setup.model_digest, setup.calibration, recipe.run.seed, setup.validation
    )
    lab = Lab(
        opened,
        subject,
        setup.bench,
        Clock(recipe.timing.tolerance, recipe.timing.budget_s),
        ingested.epoch,
        emit,
        device=setup.device,
        checkpoint_every=recipe.run.checkpoint_every,
        pool=pool,
        measured_by=measured_by,
    )
    scene = Scene(
        model=setup.original,
        graph=setup.graph,
        calibration=setup.calibration,
        baseline=ingested.latency,
        budget=recipe.budget,
        recover=setup.recover,
        seed=recipe.run.seed,
        device=setup.device,
        native_bf16=tune.native_bf16(setup.device),
        validation=setup.validation,
    )
    return lab, scene
