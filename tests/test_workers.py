"""Workers that replay a search: the same answers under the same keys as the driver's own, whoever dies."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import pytest
import torch
from test_pipeline import write_recipe
from whole_runs import Ran, forget, recovered_sha256, take

from optpipe import cli, pipeline, preparation, store
from optpipe import recipe as recipes
from optpipe.errors import MissingError, RunError, UsageError
from optpipe.lab import Pool
from optpipe.pipeline import recovering
from optpipe.pipeline.workers import afar, offer
from optpipe.pipeline.workers.local import LocalPool
from optpipe.pipeline.workers.replica import Assignment, Replica
from optpipe.results import Ingested
from optpipe.shared import SharedStore
from optpipe.types import Event

T = TypeVar("T")
ROOT = Path(__file__).resolve().parents[1]
# Every block's adaptors are trained, which is what workers are for.
# No run takes its answers from another: both blocks go, whatever they are measured to save.
SETS = (
    'method.scorer="exact"',
    "method.exact_steps=4",
    "export.precisions=[]",
    'recover.autocast="off"',
    "run.cache=false",
)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a recipe."""
    folder = tmp_path_factory.mktemp("workers")
    write_recipe(folder)
    return folder


@pytest.fixture(scope="module")
def serial(home: Path) -> Ran:
    """The run that this process alone makes."""
    return take(prepared(home, "serial"), home / "serial")


def prepared(home: Path, workers: str, *more: str) -> preparation.Setup:
    sets = (*SETS, f'run.workers="{workers}"', *more)
    return preparation.prepare(recipes.load(home / "small.toml", sets))


def trials(folder: Path) -> dict[str, str]:
    """What each trial of a run says, but for how long it took."""
    return {
        path.parent.name: "".join(
            line
            for line in path.read_text().splitlines()
            # The seal is over the seconds too; a last key has no comma after it.
            if '"seconds"' not in line and '"seal"' not in line
        )
        for path in folder.glob("trials/*/*.json")
    }


@pytest.fixture
def unanswered(home: Path, serial: Ran, tmp_path: Path) -> Path:
    """A copy of the run whose search has no answer but latencies yet."""
    folder = tmp_path / "run"
    shutil.copytree(serial.folder, folder)
    shutil.rmtree(folder / "trials")
    forget(folder, "analyze", "prune", "recover", "export", "benchmark")
    return folder


def assignment_of(home: Path, folder: Path) -> Assignment:
    opened = store.Run(folder, None)
    ingested = opened.stage_result("ingest", Ingested)
    assert ingested is not None
    return Assignment.of(prepared(home, "local:2"), opened, ingested)


def scored_batch(events: list[Event]) -> tuple[int, int]:
    """Which batch of the search asks for the blocks' errors, and how many of them."""
    batch, places = -1, 0
    for event in events:
        if event.kind == "trial" and event.done == 1:
            batch += 1
        if event.kind == "trial" and batch == 1:
            places = event.total or 0
    return 1, places


# ---------------------------------------------------------------- one worker


def test_a_replica_answers_each_request_by_its_place_under_the_drivers_keys(
    home: Path, serial: Ran, unanswered: Path
) -> None:
    replica = Replica(assignment_of(home, unanswered), lambda event: None)
    batch, places = scored_batch(serial.events)
    assert places == 2
    for place in range(places):  # the batch before it asks for latencies, which are there
        replica.compute(0, place)
    for place in reversed(range(places)):
        replica.compute(batch, place)
    wanted = trials(serial.folder)
    assert wanted
    assert {key: wanted.get(key) for key in trials(unanswered)} == trials(unanswered)


def test_a_replica_times_nothing(home: Path, unanswered: Path) -> None:
    shutil.rmtree(unanswered / "engines")
    replica = Replica(assignment_of(home, unanswered), lambda event: None)
    with pytest.raises(RunError, match="a latency that a worker needs is not there"):
        replica.compute(1, 0)


def test_a_replica_without_the_runs_folder_says_that_it_must_be_shared(home: Path, serial: Ran) -> None:
    assignment = assignment_of(home, serial.folder)
    gone = replace(assignment, folder=home)
    with pytest.raises(RunError, match="needs a folder that all of them share"):
        Replica(gone, lambda event: None)


def test_a_replica_that_would_compute_something_else_refuses(home: Path, serial: Ran) -> None:
    assignment = assignment_of(home, serial.folder)
    for other in (
        replace(assignment, model_digest="x"),
        replace(assignment, calibration_digest="x"),
        replace(assignment, device="cuda"),
        replace(assignment, native_bf16=not assignment.native_bf16),
    ):
        with pytest.raises(RunError, match="would compute something else"):
            Replica(other, lambda event: None)


@pytest.mark.parametrize("workers", ["", "local", "local:0", "local:-1", "local:two", "dask", "serial:2"])
def test_other_workers_are_refused(home: Path, workers: str) -> None:
    with pytest.raises(UsageError, match=r'\[run\] workers = ".*": must be "serial", "local:N" or "ray"'):
        recipes.load(home / "small.toml", (f'run.workers="{workers}"',))


def test_who_computes_is_no_part_of_what_is_computed(home: Path) -> None:
    frozen = {prepared(home, workers).frozen for workers in ("serial", "local:2", "ray")}
    assert len(frozen) == 1


def test_a_network_without_a_name_has_no_workers(home: Path) -> None:
    setup = prepared(home, "local:2")
    nameless = replace(setup.recipe, model=replace(setup.recipe.model, name="live:Net"))
    with pytest.raises(UsageError, match="each loads the network by its name, and this one has none"):
        pipeline.run(replace(setup, recipe=nameless), home / "nameless", fresh=False, emit=lambda event: None)
    assert not (home / "nameless").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a process with its parent")
def test_a_worker_has_asked_to_be_killed_with_its_driver() -> None:
    asked = """
import ctypes, os
from optpipe.pipeline.workers.child import die_with
die_with(os.getppid())
signal = ctypes.c_int()
ctypes.CDLL(None).prctl(2, ctypes.byref(signal))  # PR_GET_PDEATHSIG
print(signal.value)
"""
    done = subprocess.run(
        [sys.executable, "-c", asked],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert int(done.stdout) == signal.SIGKILL


# ---------------------------------------------------------------- processes of this machine


@pytest.fixture
def pool(home: Path, unanswered: Path) -> Iterator[tuple[Pool, list[Event]]]:
    events: list[Event] = []
    pool = LocalPool(assignment_of(home, unanswered), 2, events.append)
    try:
        yield pool, events
    finally:
        pool.close()


def test_processes_answer_as_this_one_does(
    serial: Ran, unanswered: Path, pool: tuple[Pool, list[Event]]
) -> None:
    done: list[tuple[int, str]] = []
    pool[0].compute(1, [0, 1], lambda place, worker: done.append((place, worker)))
    assert sorted(place for place, _ in done) == [0, 1]
    assert {name for _, name in done} <= {"worker 1", "worker 2"}
    wanted = trials(serial.folder)
    found = trials(unanswered)
    assert len(found) == 4  # each block's size, which its latency was asked with, and its error
    assert {key: wanted.get(key) for key in found} == found


@pytest.mark.slow
def test_what_a_dead_worker_was_at_is_given_to_another(
    serial: Ran, unanswered: Path, pool: tuple[Pool, list[Event]]
) -> None:
    killing = threading.Thread(target=kill_first_child, args=(lambda: children(os.getpid()),))
    killing.start()
    pool[0].compute(1, [0, 1], lambda place, worker: None)
    killing.join()
    assert [event.detail for event in pool[1] if event.kind == "warning"] == [
        "died (signal 9); another takes its place"
    ]
    wanted, found = trials(serial.folder), trials(unanswered)
    assert len(found) == 4  # each block's size, which its latency was asked with, and its error
    assert {key: wanted.get(key) for key in found} == found


def test_a_replica_elsewhere_works_by_the_store_alone(
    home: Path, serial: Ran, unanswered: Path, tmp_path: Path
) -> None:
    """What it is told of the run's folder is not there, and neither is anything of its own afterwards."""
    address = f"file://{tmp_path}/there"
    setup = prepared(home, "ray", f'run.store="{address}"')
    driver = store.Run(unanswered, None, shared=SharedStore(address, "one"))
    for path in (unanswered / "01-ingest" / "result.json", *unanswered.glob("engines/*/latency.json")):
        driver.give(path)
    ingested = driver.stage_result("ingest", Ingested)
    assert ingested is not None
    assignment = replace(Assignment.of(setup, driver, ingested), folder=tmp_path / "elsewhere")
    replica = Replica(assignment, lambda event: None)
    # The trials of the first batch are the driver's, which the replica computes for itself where it has to.
    replica.compute(1, 0)
    replica.close()
    (given,) = (tmp_path / "there" / "one" / "trials").glob("*/weights.safetensors")
    key = given.parent.name
    assert trials(tmp_path / "there" / "one")[key] == trials(serial.folder)[key]
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.slow
def test_a_worker_that_died_idle_is_replaced(unanswered: Path, pool: tuple[Pool, list[Event]]) -> None:
    pool[0].compute(1, [0, 1], lambda place, worker: None)
    for worker in children(os.getpid()):
        os.kill(worker, signal.SIGKILL)
    wait_for(lambda: all(not alive(worker) for worker in children(os.getpid())) or None)
    done: list[int] = []
    pool[0].compute(1, [0, 1], lambda place, worker: done.append(place))
    assert sorted(done) == [0, 1]
    assert [event.kind for event in pool[1]].count("warning") == 2


@pytest.mark.slow
def test_workers_that_all_die_end_the_run_with_a_reason(
    unanswered: Path, pool: tuple[Pool, list[Event]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(unanswered))
    (unanswered / "sitecustomize.py").write_text("import os\nos._exit(9)\n")
    with pytest.raises(RunError, match="3 workers died over one request, perhaps for want of memory"):
        pool[0].compute(1, [0, 1], lambda place, worker: None)


@pytest.mark.slow
def test_a_request_that_fails_fails_the_run_with_its_own_words(
    unanswered: Path, pool: tuple[Pool, list[Event]]
) -> None:
    shutil.rmtree(unanswered / "engines")
    with pytest.raises(RunError, match="a latency that a worker needs is not there"):
        pool[0].compute(1, [0, 1], lambda place, worker: None)


@pytest.mark.slow
def test_a_run_with_workers_comes_to_the_plan_and_the_weights_of_one_without(home: Path, serial: Ran) -> None:
    found = take(prepared(home, "local:2"), home / "local")
    assert found.choice.plan == serial.choice.plan
    assert recovered_sha256(found.folder) == recovered_sha256(serial.folder)
    assert trials(found.folder) == trials(serial.folder)
    answered = [detail for name, detail in found.details("trial") if detail.startswith("computed by worker")]
    assert len(answered) == 2
    assert children(os.getpid()) == []


@pytest.mark.slow
def test_workers_die_with_their_driver(home: Path, serial: Ran) -> None:
    """Killed at once, a driver cannot end its workers; they must see it themselves."""
    command = [sys.executable, "-m", "optpipe.cli", "run", str(home / "small.toml"), "--out"]
    sets = [
        word for one in (*SETS, "method.exact_steps=3000", "run.workers=local:2") for word in ("--set", one)
    ]
    driver = subprocess.Popen(
        [*command, str(home / "killed"), *sets],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    workers = wait_for(lambda: two(children(driver.pid)))
    driver.kill()
    driver.wait()
    wait_for(lambda: all(not alive(worker) for worker in workers) or None)


# ---------------------------------------------------------------- a cluster


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Ray's own
def test_a_ray_cluster_that_loses_a_node_comes_to_the_same_plan(
    home: Path, serial: Ran, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("ray", reason="the package ray is not installed")
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    other = cluster.add_node(num_cpus=1)
    events: list[Event] = []
    lost: list[str] = []

    def told(event: Event) -> None:
        events.append(event)
        if not lost and event.detail.startswith("computed by a worker"):
            lost.append(event.name)
            cluster.remove_node(other, allow_graceful=False)

    try:
        nodes = [one for one in offer.examine(cluster.address, home) if one.subject.startswith("node")]
        assert [(one.fine, one.detail) for one in nodes] == [(True, "1 cores, 0 GPUs")] * 2
        setup = prepared(home, "ray", f'run.address="{cluster.address}"')
        pipeline.run(setup, home / "ray", fresh=False, emit=told)
    finally:
        cluster.shutdown()
    assert lost, "no request came back from a worker"
    found = Ran(setup, home / "ray", serial.report, events)
    assert found.choice.plan == serial.choice.plan
    assert trials(home / "ray") == trials(serial.folder)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Ray's own
def test_ray_workers_that_do_not_see_the_folder_answer_by_the_store(
    home: Path, serial: Ran, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("ray", reason="the package ray is not installed")
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    # Not under tmp_path: Ray's sockets lie there too, and their names must be short.
    own = Path(tempfile.mkdtemp(dir="/tmp"))
    monkeypatch.setenv("TMPDIR", str(own))
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    try:
        address = f'run.store="file://{tmp_path}/there"'
        setup = prepared(home, "ray", f'run.address="{cluster.address}"', address)
        found = take(setup, home / "stored")
    finally:
        cluster.shutdown()
    assert found.choice.plan == serial.choice.plan
    assert trials(found.folder) == trials(serial.folder)
    assert recovered_sha256(found.folder) == recovered_sha256(serial.folder)
    answered = [detail for _, detail in found.details("trial") if detail.startswith("computed by a worker")]
    assert len(answered) == 2
    assert ("recover", "by a worker of the cluster") in found.details("note")
    assert found.details("progress"), "nothing was heard of the training"
    assert list(own.glob("optpipe-worker-*")) == []
    shutil.rmtree(own)


def test_a_recovery_elsewhere_is_the_drivers_own(home: Path, serial: Ran, tmp_path: Path) -> None:
    """By the store alone: the worker sees nothing of the run's folder, the driver gets the weights."""
    folder = tmp_path / "run"
    shutil.copytree(serial.folder, folder)
    forget(folder, "recover", "export", "benchmark")
    (folder / "04-recover" / "weights.safetensors").unlink()
    setup = prepared(home, "ray", f'run.store="file://{tmp_path}/there"')
    driver = store.Run(folder, None, shared=SharedStore(f"file://{tmp_path}/there", "one"))
    ingested = driver.stage_result("ingest", Ingested)
    assert ingested is not None
    for stage in ("01-ingest", "02-analyze"):
        driver.give(folder / stage / "result.json")
    assignment = replace(Assignment.of(setup, driver, ingested), folder=tmp_path / "elsewhere")
    key = recovering.key_of(setup, serial.choice)
    trained = afar.carried_out(assignment, key, lambda event: None)
    assert trained.loss_last < trained.loss_first
    assert driver.shared is not None
    assert driver.shared.take(f"recovered/{key}.safetensors", folder / "04-recover" / "weights.safetensors")
    assert recovered_sha256(folder) == recovered_sha256(serial.folder)
    with pytest.raises(RunError, match="holds another choice than the one that is recovered"):
        afar.carried_out(assignment, "another", lambda event: None)


def test_who_only_drives_needs_no_gpu_to_train_on(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    setup = prepared(home, "ray", 'run.trainer="cuda"', 'recover.autocast="auto"')
    assert setup.device == "cuda"
    assert setup.recover.autocast == "bf16"  # what a GPU is taken to do, which a worker looks at
    with pytest.raises(MissingError, match="torch finds no GPU"):
        prepared(home, "local:2", 'run.trainer="cuda"')


def test_doctor_says_how_many_workers_fit_here(capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["doctor", "--workers"])
    assert f'{os.cpu_count()} cores; workers = "local:' in capsys.readouterr().out


@pytest.mark.parametrize(
    ("count", "said"), [(0, "no GPU that torch can use"), (1, "1 GPU; "), (4, "4 GPUs; devices = 4 trains")]
)
def test_doctor_says_how_many_devices_can_share_a_recovery(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, count: int, said: str
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    cli.main(["doctor", "--workers"])
    assert f"devices: {said}" in capsys.readouterr().out


@pytest.mark.slow
def test_doctor_exits_3_where_no_cluster_answers(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("ray", reason="the package ray is not installed")
    with pytest.raises(SystemExit) as ended:
        cli.main(["doctor", "--address", "127.0.0.1:1"])
    assert ended.value.code == 3
    assert "missing cluster at 127.0.0.1:1" in capsys.readouterr().out


# ---------------------------------------------------------------- processes


def children(parent: int, kind: str = "process") -> list[int]:
    """Workers of a kind that a process has begun and that still live."""
    found: list[int] = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                words = (entry / "cmdline").read_bytes().split(b"\0")
                of = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except (OSError, ValueError):
                continue
            if of == parent and f"optpipe.pipeline.workers.{kind}".encode() in words:
                found.append(int(entry.name))
    return sorted(found)


def two(found: list[int]) -> list[int] | None:
    return found if len(found) == 2 else None


def kill_first_child(find: Callable[[], list[int]]) -> None:
    (first, *_) = wait_for(lambda: find() or None)
    time.sleep(1.0)  # it is at its request, or on the way to it
    os.kill(first, signal.SIGKILL)


def alive(process: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False


def wait_for(look: Callable[[], T | None], seconds: float = 120) -> T:
    """What ``look`` finds, as soon as it finds something."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if (found := look()) is not None:
            return found
        time.sleep(0.05)
    raise AssertionError("it did not come")
