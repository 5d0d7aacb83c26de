"""Several processes that train one network: the steps of one, whoever has which images, and whoever dies."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar, cast

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_pipeline import write_recipe
from test_tune import SGD, SHAPE, Net, candidate, weights
from test_workers import alive, children, wait_for
from torch import fx, nn
from whole_runs import Ran, forget, take

from optpipe import bank, graph, pipeline, preparation, store, tune
from optpipe import recipe as recipes
from optpipe.data import ImageSet
from optpipe.errors import MissingError, RunError, UsageError
from optpipe.pipeline import search as stages
from optpipe.pipeline.workers import devices
from optpipe.tune import evaluation
from optpipe.tune.parts import Gradients, parts_of
from optpipe.tune.peers import Alone
from optpipe.types import Event

ROOT = Path(__file__).resolve().parents[1]
COUNT = 21
CLASSES = 5
STEPS = 50
ODD = replace(SGD, batch=7, steps=STEPS)
SETTINGS = {
    "mimic, eval": replace(ODD, batch_norm="eval"),
    "mimic, train": replace(ODD, batch_norm="train"),
    "labels, teachers": replace(
        ODD,
        loss="labels",
        teachers="ensemble",
        trainable="all",
        batch_norm="eval",
        views=2,
        augment="shift_color",
        lr=0.01,
    ),
    "bfloat16, train": replace(ODD, autocast="bf16", steps=12),
    "cutmix": replace(ODD, batch_norm="eval", augment="shift_cutmix", steps=12),
}


def original(seed: int = 0) -> fx.GraphModule:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return graph.trace(Net(), SHAPE)


def images() -> ImageSet:
    pixels = torch.randint(0, 256, (COUNT, *SHAPE), generator=torch.Generator().manual_seed(1))
    names = tuple(str(number) for number in range(COUNT))
    labels = torch.arange(COUNT) % CLASSES
    return ImageSet(pixels.byte(), labels, names, (0.5,) * 3, (0.25,) * 3, digest="d" * 64)


@dataclass
class Kept:
    """A checkpoint in memory that keeps all its states."""

    every: int
    states: list[dict[str, torch.Tensor]] = field(default_factory=list)

    def load(self) -> dict[str, torch.Tensor] | None:
        return self.states[-1] if self.states else None

    def save(self, state: Mapping[str, torch.Tensor]) -> None:
        self.states.append({name: tensor.detach().clone() for name, tensor in state.items()})


Found = dict[str, torch.Tensor]
"""The losses of the steps that were done, under "losses", and the weights that they ended with."""


def trained(
    name: str,
    folder: Path,
    peers: tune.Peers = tune.ALONE,
    *,
    checkpoint: Kept | None = None,
    most: int | None = None,
    device: str = "cpu",
) -> Found:
    settings, losses = SETTINGS[name], list[float]()
    whole, student = original(), candidate(original(), settings)
    teachers = None
    if settings.teachers != "none":
        networks = [lambda: original(1), original]
        teachers = bank.build(folder, networks, images(), classes=CLASSES, device=device, peers=peers)
    with pytest.MonkeyPatch.context() as patch:
        add = Gradients.add

        def noted(self: Gradients, chosen: Sequence[int], step: int) -> float:
            losses.append(add(self, chosen, step))
            return losses[-1]

        patch.setattr(Gradients, "add", noted)
        tune.train(
            student,
            whole,
            images(),
            settings,
            seed=5,
            peers=peers,
            checkpoint=checkpoint,
            teachers=teachers,
            most=most,
            device=device,
        )
    return {"losses": torch.tensor(losses, dtype=torch.float64), **weights(student)}


def normed(peers: tune.Peers, device: str = "cpu") -> Found:
    """A batch-norm's answers, gradients and statistics for this process's part of 7 images, in float64."""
    generator = torch.Generator().manual_seed(2)
    x, wanted = (torch.randn(7, 4, 3, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    x = 5 + 0.1 * x
    layer = nn.BatchNorm2d(4).double().to(device)
    with torch.no_grad():
        layer.weight.copy_(torch.rand(4, generator=generator, dtype=torch.float64) + 0.5)
    own = tune.own_part(range(7), peers)
    part = x[own.start : own.stop].to(device).requires_grad_()
    with peers.normalised():
        out = layer(part)
    (out * wanted[own.start : own.stop].to(device)).sum().backward()
    assert part.grad is not None and layer.weight.grad is not None and layer.bias.grad is not None
    rows = torch.zeros(2, 7, 4, 3, 3, dtype=torch.float64)
    rows[0, own.start : own.stop], rows[1, own.start : own.stop] = out.detach().cpu(), part.grad.cpu()
    return {
        "rows": peers.total(rows),
        "weight": peers.total(layer.weight.grad).cpu(),
        "bias": peers.total(layer.bias.grad).cpu(),
        **{f"own {name}": buffer.cpu() for name, buffer in layer.named_buffers()},
    }


BEGUN = "labels, teachers"
"""The training that is handed over from one number of processes to another, after 20 steps."""


def rank(folder: str, device: str = "cpu") -> None:
    """What each of two processes runs; what it finds goes into the folder."""
    from optpipe.tune.together import Together

    home = Path(folder)
    peers = Together(2, device, home / "meeting", threading.Event())
    found = {name: trained(name, home / f"{name}-bank", peers, device=device) for name in SETTINGS}
    found["norm"] = normed(peers, device)
    kept = Kept(every=20)
    trained(BEGUN, home / f"{BEGUN}-bank", peers, checkpoint=kept, device=device)
    if peers.rank == 0:
        found["state"] = kept.states[0]
    else:
        assert kept.states == []
    begun = Kept(100, [torch.load(home / "state.pt")])
    found["resumed"] = trained(BEGUN, home / f"{BEGUN}-bank", peers, checkpoint=begun, device=device)
    found["parts"] = trained("mimic, eval", home, peers, most=5, device=device)
    peers.leave()
    torch.save(found, home / f"found-{peers.rank}.pt")


def pair_of(folder: Path, device: str) -> tuple[dict[str, Found], list[dict[str, Found]]]:
    """What one process finds, and what each of two does."""
    kept = Kept(every=20)
    alone = {name: trained(name, folder / f"{name}-bank-alone", device=device) for name in SETTINGS}
    alone["norm"] = normed(tune.ALONE, device)
    trained(BEGUN, folder / f"{BEGUN}-bank-alone", checkpoint=kept, device=device)
    torch.save(kept.states[0], folder / "state.pt")
    code = f"import test_devices; test_devices.rank({str(folder)!r}, {device!r})"
    path = os.pathsep.join((str(ROOT), str(ROOT / "tests")))
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONPATH": path, "LOCAL_RANK": str(place), "GLOO_SOCKET_IFNAME": "lo"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for place in range(2)
    ]
    try:
        said = [process.communicate(timeout=280)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], said
    return alone, [torch.load(folder / f"found-{place}.pt") for place in range(2)]


Pair = tuple[dict[str, Found], list[dict[str, Found]]]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return pair_of(tmp_path_factory.mktemp("pair"), "cpu")


def assert_alike(found: Found, expected: Found, within: float) -> None:
    assert len(found["losses"]) == len(expected["losses"])
    apart = float((found["losses"] - expected["losses"]).abs().max())
    assert apart < 1e-5 * min(1.0, float(expected["losses"].max()))
    for name, tensor in expected.items():
        if name != "losses":
            torch.testing.assert_close(found[name], tensor, rtol=0, atol=within)


@pytest.mark.slow
@pytest.mark.parametrize("name", SETTINGS)
def test_two_processes_take_the_steps_of_one(pair: Pair, name: str) -> None:
    """Of batches of 7 images one process has 3, the other 4."""
    alone, together = pair
    assert len(alone[name]["losses"]) == SETTINGS[name].steps
    assert len(set(alone[name]["losses"].tolist())) > 10
    for found in together:
        if SETTINGS[name].autocast == "bf16":  # whose numbers have three digits
            assert float((found[name]["losses"] - alone[name]["losses"]).abs().max()) < 2e-2
        else:
            assert_alike(found[name], alone[name], within=1e-5)


@pytest.mark.slow
def test_all_processes_end_with_the_very_same_weights(pair: Pair) -> None:
    _, (first, second) = pair
    for name in SETTINGS:
        assert all(torch.equal(tensor, second[name][key]) for key, tensor in first[name].items())


@pytest.mark.slow
def test_a_batch_norm_over_all_processes_is_that_of_all_images(pair: Pair) -> None:
    alone, together = pair
    for found in together:
        for name, tensor in alone["norm"].items():
            torch.testing.assert_close(found["norm"][name], tensor, rtol=1e-9, atol=1e-9)


@pytest.mark.slow
def test_one_process_goes_on_where_two_were(pair: Pair, tmp_path: Path) -> None:
    alone, together = pair
    state = together[0]["state"]
    assert int(state["step"]) == 20
    found = trained(BEGUN, tmp_path, checkpoint=Kept(100, [state]))
    assert len(found["losses"]) == STEPS - 20
    assert_alike(found, {**alone[BEGUN], "losses": alone[BEGUN]["losses"][20:]}, within=1e-5)


@pytest.mark.slow
def test_two_processes_go_on_where_one_was(pair: Pair) -> None:
    alone, together = pair
    for found in together:
        assert_alike(found["resumed"], {**alone[BEGUN], "losses": alone[BEGUN]["losses"][20:]}, within=1e-5)


@pytest.mark.slow
def test_parts_of_a_batch_are_shared_too(pair: Pair) -> None:
    """With 5 images at once: 3 of a batch of 7 and then 4, of each of which both processes have some."""
    alone, together = pair
    for found in together:
        assert_alike(found["parts"], alone["mimic, eval"], within=1e-5)


@pytest.mark.parametrize("batch", [4, 64])
def test_a_bank_that_two_have_built_is_the_one_of_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, batch: int
) -> None:
    """Three batches for each of them, or a single one that one of them has."""
    monkeypatch.setattr(evaluation, "STATISTICS_BATCH", batch)
    monkeypatch.setattr(bank, "ROWS", 4)
    made = [original(), original(1)]
    networks = [lambda: made[0], lambda: made[1]]
    alone = bank.build(tmp_path / "alone", networks, images(), classes=CLASSES)
    peers = [Turns(place) for place in range(2)]
    built: list[bank.MemoryBank] = []

    def build(place: int) -> None:
        built.append(bank.build(tmp_path / "both", networks, images(), classes=CLASSES, peers=peers[place]))

    both = [threading.Thread(target=build, args=(place,)) for place in range(2)]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join(60)
    assert [one.losses for one in built] == [alone.losses] * 2
    for teacher in range(2):
        assert np.array_equal(built[0].logits[teacher], alone.logits[teacher])
    names = sorted(path.name for path in (tmp_path / "both").iterdir())
    assert names == ["teacher-0.npy", "teacher-1.npy"]


class Turns(Alone):
    """Two threads that sum what they have, in place of processes."""

    size = 2
    _all: ClassVar[list[torch.Tensor]] = []
    _met = threading.Barrier(2, timeout=60)

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def total(self, values: torch.Tensor) -> torch.Tensor:
        self._all.append(values)
        self._met.wait()
        summed = torch.stack(self._all).sum(dim=0)
        if self._met.wait() == 0:
            self._all.clear()
        self._met.wait()
        return summed


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two NVIDIA GPUs")
@pytest.mark.parametrize("name", SETTINGS)
def test_two_gpus_take_the_steps_of_one(gpus: Pair, name: str) -> None:
    alone, together = gpus
    for found in together:
        assert float((found[name]["losses"] - alone[name]["losses"]).abs().max()) < 1e-2
        assert float(found[name]["losses"][0]) == pytest.approx(float(alone[name]["losses"][0]), rel=1e-3)


@pytest.fixture(scope="module")
def gpus(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return pair_of(tmp_path_factory.mktemp("gpus"), "cuda")


# ---------------------------------------------------------------- who has what


def test_each_process_has_its_share_of_a_batch_and_none_has_none() -> None:
    three = [Turns(place) for place in range(3)]
    for peer in three:
        peer.size = 3
    assert [list(tune.own_part(range(4, 11), peer)) for peer in three] == [[4, 5], [6, 7], [8, 9, 10]]
    for count in range(3, 12):
        for most in range(3, 12):
            parts = parts_of(count, most, 3)
            assert [place for part in parts for place in part] == list(range(count))
            assert min(len(part) for part in parts) >= 3


# ---------------------------------------------------------------- how they end


class Scripted:
    """A process that says what it is told to, and ends."""

    scripts: ClassVar[list[tuple[object, ...]]] = []
    heard: ClassVar[list[object]] = []

    def __init__(self, module: str, environment: Mapping[str, str]) -> None:
        assert module == "optpipe.pipeline.workers.rank"
        place = int(environment["LOCAL_RANK"])
        ours, theirs = socket.socketpair()
        self.connection = Connection(ours.detach())
        with Connection(theirs.detach()) as other:
            for message in self.scripts[place]:
                other.send(message)

    def end(self) -> int:
        self.connection.close()
        return -9


DONE = ("done", 2.0, 1.0)


def ends(monkeypatch: pytest.MonkeyPatch, *scripts: tuple[object, ...]) -> tune.Trained | None:
    monkeypatch.setattr(Scripted, "scripts", scripts)
    monkeypatch.setattr(devices, "Child", Scripted)
    monkeypatch.setattr(devices, "LAST_WORDS_S", 0.2)
    order = cast("devices.Order", SimpleNamespace(size=len(scripts)))
    ranks = devices.Ranks(order, lambda event: None)
    try:
        return ranks.trained()
    finally:
        ranks.end()


def test_what_all_processes_come_to_is_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ends(monkeypatch, (DONE,), (DONE,)) == tune.Trained(2.0, 1.0)


def test_a_failure_that_explains_itself_is_told_in_its_words(monkeypatch: pytest.MonkeyPatch) -> None:
    lost = ("failed", "RuntimeError", "Connection closed by peer")
    with pytest.raises(UsageError, match="give labels"):
        ends(monkeypatch, (lost,), (("failed", "UsageError", "give labels"),))


def test_a_process_that_dies_is_the_reason_of_those_that_miss_it(monkeypatch: pytest.MonkeyPatch) -> None:
    lost = ("failed", "RuntimeError", "Connection closed by peer")
    expected = r"\[run\] devices = 2: the process of device 1 died \(signal 9\), .* goes on from the last"
    with pytest.raises(RunError, match=expected):
        ends(monkeypatch, (lost,), ())


def test_want_of_memory_on_one_device_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    lost = ("failed", "RuntimeError", "Connection closed by peer")
    assert ends(monkeypatch, (lost,), (("memory",),)) is None


def test_any_other_failure_names_its_device(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RunError, match=r"devices = 2: device 1: ValueError: odd"):
        ends(monkeypatch, (DONE,), (("failed", "ValueError", "odd"),))


def test_half_as_many_images_are_taken_until_each_device_has_one() -> None:
    events: list[Event] = []
    assert devices._halved(7, 2, events.append) == 4
    assert devices._halved(3, 2, events.append) == 2
    assert [event.kind for event in events] == ["warning"] * 2
    assert "with 7 images at once on 2: begins at the last checkpoint with 4 at once" in events[0].detail
    with pytest.raises(RunError, match="one image at a time on each of 2"):
        devices._halved(2, 2, events.append)


# ---------------------------------------------------------------- whole runs


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("devices")
    write_recipe(folder)
    return folder


def prepared(home: Path, *sets: str) -> preparation.Setup:
    always = ("export.precisions=[]", 'recover.autocast="off"', "run.cache=false", "recover.batch=7")
    return preparation.prepare(recipes.load(home / "small.toml", (*always, *sets)))


def test_how_many_devices_there_are_is_no_part_of_what_is_computed(home: Path) -> None:
    assert len({prepared(home, f"run.devices={count}").frozen for count in (1, 2, 3)}) == 1


@pytest.mark.parametrize("count", [0, -1])
def test_no_devices_at_all_are_refused(home: Path, count: int) -> None:
    with pytest.raises(UsageError, match=rf"\[run\] devices = {count}: must be above 0"):
        prepared(home, f"run.devices={count}")


def test_more_devices_than_images_in_a_batch_are_refused(home: Path) -> None:
    with pytest.raises(UsageError, match=r"devices = 8: a batch of the recovery has 7 images"):
        pipeline.check(prepared(home, "run.devices=8"), home / "none")


def test_without_the_package_several_devices_are_refused(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    setup = prepared(home, "run.devices=2")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        MissingError, match=r"lightning-fabric is not installed; pip install 'optpipe\[multi\]'"
    ):
        pipeline.check(setup, home / "none")


def test_more_devices_than_the_machine_has_are_refused(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    setup = replace(prepared(home, "run.devices=3"), device="cuda")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UsageError, match=r"devices = 3: this machine has 2 GPUs"):
        pipeline.check(setup, home / "none")


def test_a_network_without_a_name_stays_on_one_device(home: Path) -> None:
    setup = prepared(home, "run.devices=2")
    nameless = replace(setup.recipe, model=replace(setup.recipe.model, name="live:Net"))
    with pytest.raises(UsageError, match="devices = 2: each loads the network by its name"):
        pipeline.check(replace(setup, recipe=nameless), home / "none")


@pytest.fixture(scope="module")
def long(home: Path) -> Ran:
    """A run of one process whose recovery is long enough to be ended in."""
    return take(prepared(home, *LONG), home / "long")


LONG = ("recover.steps=600", "recover.lr=0.002")


@pytest.fixture
def unrecovered(long: Ran, tmp_path: Path) -> store.Run:
    """A copy of that run as it was before its recovery."""
    shutil.copytree(long.folder, tmp_path / "run")
    forget(tmp_path / "run", "recover", "export", "benchmark")
    for path in (tmp_path / "run" / "04-recover").glob("*.safetensors"):
        path.unlink()
    return store.Run(tmp_path / "run", None)


def assert_recovered(opened: store.Run, long: Ran, within: float = 1e-4) -> None:
    """The weights are those of the other run, which are far from what they were before."""
    pruned, found, expected = (
        load_file(folder / stage / "weights.safetensors")
        for folder, stage in (
            (long.folder, "03-prune"),
            (opened.folder, "04-recover"),
            (long.folder, "04-recover"),
        )
    )
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=within)
    moved = max(float((tensor - pruned[name]).abs().max()) for name, tensor in expected.items())
    assert moved > 10 * within


def checkpoints(opened: store.Run) -> list[Path]:
    return list((opened.folder / "04-recover").glob("checkpoint-*.safetensors"))


@pytest.mark.slow
def test_a_run_on_two_devices_recovers_as_one_on_one_does(
    home: Path, long: Ran, unrecovered: store.Run
) -> None:
    events: list[Event] = []
    setup = prepared(home, *LONG, "run.devices=2")
    recovered = stages.recover(setup, unrecovered, long.choice, events.append)
    assert recovered.loss_last is not None
    assert_recovered(unrecovered, long)
    progress = [event.done or 0 for event in events if event.kind == "progress"]
    assert progress == sorted(progress) and progress[-1] == 600
    assert children(os.getpid(), "rank") == []


TAUGHT = (
    *("data.calibration.labels=true", "recover.loss=labels", "recover.teachers=single", "recover.views=2"),
    *("recover.trainable=all", "recover.augment=shift", "recover.batch_norm=eval", "recover.steps=40"),
    "recover.lr=0.005",
)


@pytest.mark.slow
def test_two_devices_build_the_bank_of_their_recovery_and_learn_from_it(home: Path, tmp_path: Path) -> None:
    one = take(prepared(home, *TAUGHT), tmp_path / "one")
    shutil.copytree(one.folder, tmp_path / "two")
    forget(tmp_path / "two", "recover", "export", "benchmark")
    for path in (tmp_path / "two" / "04-recover").glob("*.safetensors"):
        path.unlink()
    opened, events = store.Run(tmp_path / "two", None), list[Event]()
    stages.recover(prepared(home, *TAUGHT, "run.devices=2"), opened, one.choice, events.append)
    assert_recovered(opened, one, within=1e-3)
    told = [event for event in events if event.name == "memory bank"]
    assert [event.kind for event in told] == ["note", "progress"]  # by one of them
    assert list((opened.folder / "04-recover").glob("bank-*")) == []


@pytest.mark.slow
def test_a_process_that_is_killed_ends_the_recovery_and_one_device_goes_on(
    home: Path, long: Ran, unrecovered: store.Run
) -> None:
    def kill() -> None:
        wait_for(lambda: checkpoints(unrecovered) or None)
        os.kill(children(os.getpid(), "rank")[-1], signal.SIGKILL)

    killing = threading.Thread(target=kill)
    killing.start()
    with pytest.raises(RunError, match=r"the process of device \d died \(signal 9\)"):
        stages.recover(prepared(home, *LONG, "run.devices=2"), unrecovered, long.choice, lambda event: None)
    killing.join()
    assert children(os.getpid(), "rank") == []
    assert not (unrecovered.folder / "04-recover" / "weights.safetensors").exists()
    events: list[Event] = []
    stages.recover(prepared(home, *LONG), unrecovered, long.choice, events.append)
    assert min(event.done or 0 for event in events if event.kind == "progress") > 3
    assert_recovered(unrecovered, long)


SHORT = """
import os
if os.environ.get("LOCAL_RANK") == "1":
    import torch
    forward = torch.nn.Conv2d.forward
    def short(self, images):
        if len(images) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB")
        return forward(self, images)
    torch.nn.Conv2d.forward = short
"""


@pytest.mark.slow
def test_one_device_that_is_out_of_memory_has_all_take_fewer_images_at_once(
    home: Path, long: Ran, unrecovered: store.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second one has room for 2 images: not for its 4 of a batch of 7, but for those of a part of 4."""
    (tmp_path / "sitecustomize.py").write_text(SHORT)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join((str(tmp_path), str(ROOT), str(home))))
    events: list[Event] = []
    setup = prepared(home, *LONG, "run.devices=2")
    recovered = stages.recover(setup, unrecovered, long.choice, events.append)
    assert [event.detail.partition(": ")[0] for event in events if event.kind == "warning"] == [
        "out of memory on a GPU with 7 images at once on 2"
    ]
    assert recovered.loss_first is not None and recovered.loss_last is not None
    assert recovered.loss_last < recovered.loss_first
    assert (unrecovered.folder / "04-recover" / "weights.safetensors").exists()
    assert children(os.getpid(), "rank") == []


@pytest.mark.slow
def test_ctrl_c_ends_all_processes_and_keeps_their_step(
    home: Path, long: Ran, unrecovered: store.Run
) -> None:
    """Checkpoints are far apart: what is kept was kept for the interrupt."""
    sets = ("run.devices=2", "export.precisions=[]", "recover.autocast=off", "run.cache=false")
    words = [*sets, "recover.batch=7", *LONG, "run.checkpoint_every=100000"]
    # Every key of a run but who computes belongs to it.
    shutil.rmtree(unrecovered.folder)
    command = [sys.executable, "-m", "optpipe.cli", "run", str(home / "small.toml")]
    command += ["--out", str(unrecovered.folder), *(word for one in words for word in ("--set", one))]
    with subprocess.Popen(
        command,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as driver:
        assert driver.stderr is not None
        try:
            assert any("training " in line for line in driver.stderr)
            ranks = children(driver.pid, "rank")
            driver.send_signal(signal.SIGINT)
            said = driver.stderr.read()
            assert driver.wait(timeout=10) == 130
        finally:
            driver.kill()
    assert len(ranks) == 2
    wait_for(lambda: all(not alive(rank) for rank in ranks) or None)
    assert "Traceback" not in said
    (path,) = checkpoints(unrecovered)
    assert 0 < int(load_file(path)["step"]) < 600
    setup = prepared(home, *LONG, "run.checkpoint_every=100000")
    pipeline.run(setup, unrecovered.folder, fresh=False, emit=lambda event: None)
    assert_recovered(unrecovered, long)
