"""The place where machines without a common folder have each other's answers."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from pathlib import Path

import pytest

from optpipe import store
from optpipe.errors import MissingError, RunError, UsageError
from optpipe.shared import SharedStore


@dataclass(frozen=True)
class Said:
    value: float


@pytest.fixture(params=["file", "memory"])
def address(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return f"file://{tmp_path / 'there'}" if request.param == "file" else f"memory://{tmp_path.name}"


def run(folder: Path, address: str, name: str = "one") -> store.Run:
    return store.Run(folder, None, shared=SharedStore(address, name))


def test_what_one_gives_another_takes(address: str, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"weights")
    SharedStore(address, "one").give("trials/k/weights", tmp_path / "a")
    assert SharedStore(address, "one").take("trials/k/weights", tmp_path / "new" / "b")
    assert (tmp_path / "new" / "b").read_bytes() == b"weights"


def test_what_nobody_gave_is_not_there(address: str, tmp_path: Path) -> None:
    assert not SharedStore(address, "one").take("trials/k/weights", tmp_path / "b")
    assert list(tmp_path.iterdir()) == []


def test_runs_at_one_address_have_nothing_of_each_other(address: str, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"weights")
    SharedStore(address, "one").give("weights", tmp_path / "a")
    assert not SharedStore(address, "two").take("weights", tmp_path / "b")


def test_no_temporary_file_stays_behind(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"weights")
    shared = SharedStore(f"file://{tmp_path / 'there'}", "one")
    shared.give("weights", tmp_path / "a")
    shared.give("weights", tmp_path / "a")  # by another worker that computed the same
    assert [path.name for path in (tmp_path / "there" / "one").iterdir()] == ["weights"]


def test_nobody_takes_half_a_file(tmp_path: Path) -> None:
    """A reader that asks all the while finds nothing, or the whole."""
    (tmp_path / "a").write_bytes(b"x" * 20_000_000)
    shared, done, sizes = SharedStore(f"file://{tmp_path / 'there'}", "one"), threading.Event(), set[int]()

    def ask() -> None:
        while not done.is_set():
            if shared.take("weights", tmp_path / "b"):
                sizes.add((tmp_path / "b").stat().st_size)

    reader = threading.Thread(target=ask)
    reader.start()
    for _ in range(5):
        shared.give("weights", tmp_path / "a")
    done.set()
    reader.join()
    assert sizes <= {20_000_000}


def test_an_answer_of_another_machine_becomes_the_runs_own(address: str, tmp_path: Path) -> None:
    worker, driver = run(tmp_path / "worker", address), run(tmp_path / "driver", address)
    worker.store_answer("trials", "k", "trial.json", Said(0.5))
    assert driver.answer("trials", "k", "trial.json", Said) == (Said(0.5), False)
    assert (tmp_path / "driver" / "trials" / "k" / "trial.json").exists()
    assert driver.answer("trials", "other", "trial.json", Said) is None


def test_weights_of_another_machine_are_there_when_they_are_asked_for(address: str, tmp_path: Path) -> None:
    worker, driver = run(tmp_path / "worker", address), run(tmp_path / "driver", address)
    assert not driver.has(driver.weights("k"))
    worker.weights("k").parent.mkdir(parents=True)
    worker.weights("k").write_bytes(b"weights")
    worker.give(worker.weights("k"))
    assert driver.has(driver.weights("k"))
    assert driver.weights("k").read_bytes() == b"weights"


def test_a_run_has_one_name_at_the_address_and_a_fresh_one_another(tmp_path: Path) -> None:
    names = []
    for fresh in (False, False, True):
        with store.open_run(
            tmp_path / "run", "a = 1\n", fresh=fresh, cache=None, shared=f"file://{tmp_path}/there"
        ) as opened:
            assert opened.shared is not None
            names.append(opened.shared.run)
    assert names[0] == names[1] != names[2]


def test_no_run_shares_anything_unasked(tmp_path: Path) -> None:
    with store.open_run(tmp_path / "run", "a = 1\n", fresh=False, cache=None) as opened:
        assert opened.shared is None
    assert not (tmp_path / "run" / store.SHARED).exists()


def test_an_unknown_kind_of_address_is_refused() -> None:
    with pytest.raises(UsageError, match=r'\[run\] store = "tape://there": .*tape'):
        SharedStore("tape://there", "one")


def test_a_kind_whose_package_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "s3fs", None)
    with pytest.raises(MissingError, match=r"Install s3fs.*install that on all machines"):
        SharedStore("s3://bucket/there", "one")


def test_an_address_that_cannot_be_written_ends_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "there").write_text("a file")
    (tmp_path / "a").write_bytes(b"weights")
    with pytest.raises(RunError, match=r"cannot be written: .*it goes on from here") as raised:
        SharedStore(f"file://{tmp_path}/there", "one").give("weights", tmp_path / "a")
    assert "\n" not in str(raised.value)
