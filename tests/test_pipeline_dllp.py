"""DLLP through all six stages on the shipped digits: narrower networks, zeros, ensembles, what stops it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from whole_runs import Ran, forget, interrupt, recovered_sha256, take

import optpipe
from optpipe import graph, preparation, store, tune
from optpipe import recipe as recipes
from optpipe.deploy.bundle import verify
from optpipe.errors import UsageError
from optpipe.results import Pruned
from optpipe.types import Event, Plan, Start

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
TINY = (
    "data.calibration.count=64",
    "data.evaluation.count=40",
    'export.precisions=["fp32"]',
    "timing.tolerance=0.5",
    "timing.budget_s=0.02",
    "timing.final_budget_s=0.02",
    "timing.drift=1000",
    "target.threads=1",
    "method.epochs=2",
    "method.batch=16",
    "method.travel=4",
    "run.checkpoint_every=1",
)
STEPS = 8


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def prepare(home: Path, budget: str, *overrides: str) -> preparation.Setup:
    """The shipped recipe with a budget of another kind, in a folder of its own, and settings for a test."""
    text = (ROOT / "recipes" / "dllp.toml").read_text(encoding="utf-8")
    text = text.replace('"weights/', f'"{ROOT}/recipes/weights/').replace('"../', f'"{ROOT}/')
    head, table, _ = text.partition("[budget]\n")
    path = home / "dllp.toml"
    path.write_text(f"{head}{table}{budget}\n", encoding="utf-8")
    return preparation.prepare(recipes.load(path, [*TINY, *overrides]))


def trained(events: list[Event], origin: str) -> list[str]:
    """The trainings of an origin."""
    names = {"gates", "settling", "zeros"}
    return [
        event.name
        for event in events
        if event.kind == "trial" and event.name in names and event.detail == origin
    ]


def pruned_sparsity(ran: Ran) -> float:
    found = store.Run(ran.folder, None).stage_result("prune", Pruned)
    assert found is not None and found.sparsity is not None
    return found.sparsity


FILTERS = "macs_reduction = 0.4"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pipeline_dllp")


@pytest.fixture(scope="module")
def finished(home: Path) -> Ran:
    return take(prepare(home, FILTERS), home / "finished")


# ---------------------------------------------------------------- filters


def test_a_narrower_network_is_shipped_as_the_search_leaves_it(finished: Ran) -> None:
    report, choice = finished.report, finished.choice
    assert report.budget.met and report.result.macs <= 0.6 * report.original.macs
    assert report.plan.keep_channels and not report.plan.drop_blocks
    assert report.recover.steps == 0
    assert recovered_sha256(finished.folder) == store.file_sha256(
        finished.folder / "03-prune" / "weights.safetensors"
    )
    assert trained(finished.events, "computed") == ["gates", "settling"]
    assert verify(finished.folder) == []
    # It computes what the first particle does with the channels cut.
    setup, start = finished.setup, choice.start
    assert start is not None and start.part == "networks.0."
    whole = graph.apply(setup.original, Plan(), setup.target.input_shape)
    store.load_tensors(whole, store.Run(finished.folder, None).weights(start.key), start.part)
    images = setup.evaluation.batch(slice(None))
    cut = graph.apply(whole, choice.plan, setup.target.input_shape).eval()
    shipped = optpipe.load(finished.folder)
    with torch.inference_mode():
        torch.testing.assert_close(shipped(images), cut(images))


def test_the_report_shows_theta_weights_and_that_the_cut_changed_nothing(finished: Ran) -> None:
    text = (finished.folder / "report.md").read_text(encoding="utf-8")
    for words in (
        "Networks of the family that were tried",
        "Cutting the spike out (",
        "Theta of channels by layer",
        "above a threshold on theta",
        "**The price of knowing.** `uncertainty.onnx` joins 2 networks",
    ):
        assert words in text
    looked = next(table for table in finished.report.tables if table.title.startswith("Cutting"))
    assert float(str(looked.rows[-1][-1])) < 1e-3
    titles = [figure.title for figure in finished.report.figures]
    assert titles[0] == "Theta of all units" and sum(title.startswith("Weights of") for title in titles) > 2
    assert len(list((finished.folder / "figures").glob("*.svg"))) >= len(titles)


def test_the_bundles_runner_tells_how_sure_the_particles_are(finished: Ran, home: Path) -> None:
    ensemble = finished.report.ensemble
    assert ensemble is not None and ensemble.members == 2 and ensemble.latency is not None
    with np.load(ROOT / "calibration_data" / "digits_evaluation.npz") as file:
        np.save(home / "images.npy", file["images"][:20])
    runner = finished.folder / "deploy" / "run_engine.py"
    words = [str(runner), str(home / "images.npy"), "--uncertainty", "--json"]
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)["images"]
    assert len(told) == 20
    assert all(image["expected_entropy"] >= 0 for image in told)
    assert max(image["mutual_information"] for image in told) > 0


def test_a_search_given_again_trains_nothing(finished: Ran, monkeypatch: pytest.MonkeyPatch) -> None:
    choice = finished.choice
    forget(finished.folder, "analyze")
    interrupt(monkeypatch, tune, "fit", 0)
    again = take(finished.setup, finished.folder)
    assert again.choice == choice
    assert trained(again.events, "reused") == ["gates", "settling"]
    assert again.details("stage")[3:] == [(stage, "reused") for stage in store.STAGES[2:]]


@pytest.mark.parametrize(
    ("after", "done"), [(2, []), (6, ["gates"])], ids=["in the gates", "in the settling"]
)
def test_a_search_that_was_stopped_ends_as_one_that_was_not(
    home: Path, finished: Ran, after: int, done: list[str]
) -> None:
    folder, before = home / f"stopped {after}", list[Event]()
    setup = prepare(home, FILTERS, "export.uncertainty=false")
    with pytest.MonkeyPatch.context() as patch:
        interrupt(patch, tune, "batch_indices", after)
        with pytest.raises(KeyboardInterrupt):
            take(setup, folder, events=before)
    assert trained(before, "computed") == done
    assert len(list(folder.glob("trials/*/checkpoint.safetensors"))) == 1
    steps = list[Event]()
    again = take(setup, folder, events=steps)
    assert trained(steps, "reused") == done
    assert again.choice == finished.choice
    assert recovered_sha256(folder) == recovered_sha256(finished.folder)
    assert not list(folder.glob("trials/*/checkpoint.safetensors"))


def test_magnitude_pruning_trains_one_network_and_makes_no_ensemble(home: Path) -> None:
    setup = prepare(home, FILTERS, "method.score=magnitude")
    with pytest.raises(UsageError, match="uncertainty = true: dllp left the chosen network alone"):
        take(setup, home / "magnitude")
    alone = prepare(home, FILTERS, "method.score=magnitude", "export.uncertainty=false")
    ran = take(alone, home / "magnitude", fresh=True)
    assert ran.report.budget.met and ran.report.ensemble is None
    assert trained(ran.events, "computed") == ["settling"]
    assert ran.choice.members == ()


def test_ekg_recovers_what_dllp_pruned(home: Path) -> None:
    words = ("recover.name=ekg", "recover.epochs=1", "recover.batch=16", "recover.augment=none")
    setup = prepare(home, FILTERS, *words, "export.uncertainty=false")
    ran = take(setup, home / "ekg")
    assert ran.report.budget.met and ran.report.recover.loss == "labels" and ran.report.recover.steps > 0
    assert recovered_sha256(ran.folder) != store.file_sha256(ran.folder / "03-prune" / "weights.safetensors")
    assert verify(ran.folder) == []


# ---------------------------------------------------------------- zeros


def fours_of(path: Path) -> list[torch.Tensor]:
    """The convolutions' weights of an ONNX file whose inputs come in fours, in fours."""
    weights = [
        torch.from_numpy(numpy_helper.to_array(tensor).copy())
        for tensor in onnx.load(path).graph.initializer
        if len(tensor.dims) == 4
    ]
    return [graph.fours(weight) for weight in weights if weight.shape[1] % 4 == 0]


def test_half_of_the_single_weights_are_zeros_in_the_file(home: Path) -> None:
    ran = take(prepare(home, "sparsity = 0.5", "method.granularity=weight"), home / "weight")
    start = ran.choice.start
    assert ran.report.plan == Plan() and start is not None
    assert ran.report.budget.met
    assert start == Start(start.key, Plan(), "networks.0.")
    total = graph.weight_count(ran.setup.original)
    assert pruned_sparsity(ran) == pytest.approx(0.5, abs=1 / total)
    assert graph.sparsity(optpipe.load(ran.folder)) == pruned_sparsity(ran)
    assert trained(ran.events, "computed") == ["gates", "settling", "zeros"]
    assert ran.report.ensemble is not None and ran.report.ensemble.members == 2
    assert "only an engine with a sparse path is faster for it" in ran.report.reason
    assert verify(ran.folder) == []


def test_two_of_each_four_are_zeros_in_the_shipped_onnx_file(home: Path) -> None:
    setup = prepare(home, "sparsity = 0.4", "method.granularity=2:4", "export.uncertainty=false")
    ran = take(setup, home / "fours")
    assert ran.report.budget.met and pruned_sparsity(ran) >= 0.4
    fours = fours_of(ran.folder / "deploy" / "model.onnx")
    assert len(fours) == 18  # all convolutions but the first, which reads a grey image
    for values in fours:
        assert int((values == 0).sum(-1).min()) == 2
    assert verify(ran.folder) == []
