from __future__ import annotations

import gc
import multiprocessing
import os
import re
import signal
import tempfile
from collections.abc import Callable
from multiprocessing.synchronize import Event as ProcessEvent
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from optpipe import locks, timing
from optpipe.errors import RunError
from optpipe.types import DeviceState, Fingerprint, Latency, Sample

MACHINE = Fingerprint("a processor", "an OS", (("engine", "1"),), threads=2)


class Scripted:
    """A session whose times come from a function of how many runs there were before, of any session."""

    def __init__(self, journal: list[str], name: str, time_ms: Callable[[list[str]], float]) -> None:
        self.journal, self.name, self.time_ms = journal, name, time_ms

    def run(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        return images

    headline = "Latency"
    notes: tuple[str, ...] = ()

    def state(self) -> DeviceState | None:
        return None

    def sample(self) -> Sample:
        self.journal.append(self.name)
        return Sample(compute_ms=self.time_ms(self.journal))

    def close(self) -> None:
        pass


def scripted(
    baseline: Callable[[list[str]], float], candidate: Callable[[list[str]], float]
) -> tuple[Scripted, Scripted, list[str]]:
    journal: list[str] = []
    return Scripted(journal, "A", baseline), Scripted(journal, "B", candidate), journal


def noisy(scale_ms: float, seed: int, spread: float = 0.02) -> Callable[[list[str]], float]:
    rng = np.random.default_rng(seed)
    return lambda _: float(scale_ms * np.exp(rng.normal(0, spread)))


def measure(
    baseline: Scripted, candidate: Scripted, *, tolerance: float = 0.0, max_pairs: int = 200, seed: int = 0
) -> timing.PairedMeasurement:
    return timing.paired(
        baseline, candidate, tolerance=tolerance, budget_s=60, warmup_s=0, seed=seed, max_pairs=max_pairs
    )


def test_median_and_percentile_of_known_values() -> None:
    values = np.array([4.0, 1.0, 3.0, 2.0])
    assert timing.median(values) == 2.5
    assert timing.median(values[:3]) == 3.0
    assert timing.percentile(values, 90) == pytest.approx(3.7)


def test_coefficient_of_variation_uses_the_sample_deviation() -> None:
    # Mean 5, squared distances 9+1+1+9 = 20, over n-1 = 3.
    assert timing.coefficient_of_variation(np.array([2.0, 4.0, 6.0, 8.0])) == pytest.approx(
        (20 / 3) ** 0.5 / 5
    )
    assert timing.coefficient_of_variation(np.array([2.0])) == 0.0


def test_latency_figures_of_the_numbers_from_1_to_100() -> None:
    found = timing.to_latency(np.arange(1.0, 101.0), MACHINE, warmup=7, converged=False)
    assert (found.median_ms, found.mean_ms, found.min_ms, found.max_ms) == (50.5, 50.5, 1.0, 100.0)
    assert (found.p90_ms, found.p95_ms, found.p99_ms) == pytest.approx((90.1, 95.05, 99.01))
    assert (found.samples, found.warmup, found.converged, found.ratio_to_original) == (100, 7, False, None)


def test_no_samples_are_an_error_and_no_latency() -> None:
    with pytest.raises(ValueError, match="no samples"):
        timing.to_latency(np.array([]), MACHINE, warmup=0, converged=True)


def test_the_same_seed_gives_the_same_interval_and_another_seed_another() -> None:
    values = np.random.default_rng(0).exponential(size=101)
    first, again, other = (timing.median_interval(values, np.random.default_rng(s)) for s in (1, 1, 2))
    assert first == again != other


def test_interval_of_a_median_is_near_the_textbook_one() -> None:
    # The median of n normal values has standard deviation sqrt(pi / 2 / n).
    values = np.random.default_rng(3).normal(10, 1, 1001)
    low, high = timing.median_interval(values, np.random.default_rng(0))
    assert (high - low) / 2 == pytest.approx(1.96 * (np.pi / 2 / 1001) ** 0.5, rel=0.3)


def test_equal_values_have_an_interval_of_no_width() -> None:
    assert timing.median_interval(np.full(50, 3.0), np.random.default_rng(0)) == (3.0, 3.0)


def test_swapping_the_engines_gives_the_reciprocal_ratio() -> None:
    rng = np.random.default_rng(0)
    samples = rng.lognormal(size=(40, 2))
    order = np.tile([True, False], 20)
    forward, _ = timing.ratio_interval(samples, order, np.random.default_rng(0))
    backward, _ = timing.ratio_interval(samples[:, ::-1], ~order, np.random.default_rng(0))
    assert forward * backward == pytest.approx(1.0)


def test_interval_covers_the_truth_19_times_in_20_even_where_noise_lingers() -> None:
    covered = 0
    for trial in range(200):
        rng = np.random.default_rng(trial)
        common = np.zeros(200)
        for i in range(1, 200):
            common[i] = 0.9 * common[i - 1] + rng.normal(0, 0.01)
        bursts = np.where(rng.random((200, 2)) < 0.1, rng.exponential(0.5, (200, 2)), 0.0)
        logs = common[:, None] + bursts + rng.normal(0, 0.005, (200, 2)) + np.log([10.0, 8.0])
        _, (low, high) = timing.ratio_interval(np.exp(logs), np.tile([True, False], 100), rng)
        covered += low <= 0.8 <= high
    assert covered >= 180


def test_known_ratio_is_found_and_its_interval_holds_it() -> None:
    baseline, candidate, _ = scripted(noisy(10, 1), noisy(7, 2))
    found = measure(baseline, candidate)
    assert found.ratio == pytest.approx(0.7, rel=0.01)
    assert found.ratio_ci95[0] < 0.7 < found.ratio_ci95[1]
    assert found.samples_ms.shape == (200, 2)
    assert found.candidate(MACHINE).ratio_to_original == found.ratio
    assert found.candidate(MACHINE).median_ms == pytest.approx(7, rel=0.01)
    assert found.baseline(MACHINE).ratio_to_original is None
    assert found.baseline(MACHINE).median_ms == pytest.approx(10, rel=0.01)


def test_every_four_runs_hold_both_orders_and_neither_always_leads() -> None:
    baseline, candidate, journal = scripted(noisy(1, 1), noisy(1, 2))
    found = measure(baseline, candidate)
    runs = "".join(journal[2 * found.warmup :])
    groups = {runs[i : i + 4] for i in range(0, len(runs), 4)}
    assert groups == {"ABBA", "BAAB"}
    assert found.baseline_first.sum() == len(found.samples_ms) / 2


def test_going_second_being_slower_does_not_show_in_the_ratio() -> None:
    def slow_second(journal: list[str]) -> float:
        # Warm-up is three runs each; after it, the second of every two runs takes a tenth more.
        return 10.0 if len(journal) % 2 else 11.0

    baseline, candidate, _ = scripted(slow_second, slow_second)
    assert measure(baseline, candidate).ratio == pytest.approx(1.0)


def test_a_machine_that_slows_down_does_not_show_in_the_ratio() -> None:
    def drifting(journal: list[str]) -> float:
        return 10.0 + 0.05 * len(journal)

    baseline, candidate, _ = scripted(drifting, drifting)
    assert measure(baseline, candidate).ratio == pytest.approx(1.0, abs=0.001)


def test_warm_up_is_counted_and_in_no_average() -> None:
    def slow_at_first(journal: list[str]) -> float:
        return 1000.0 if len(journal) <= 6 else 1.0

    baseline, candidate, _ = scripted(slow_at_first, slow_at_first)
    found = measure(baseline, candidate)
    assert found.warmup == 3
    assert found.samples_ms.max() == 1.0
    lone, _, _ = scripted(lambda journal: 1000.0 if len(journal) <= 3 else 1.0, noisy(1, 1))
    alone = timing.single(lone, budget_s=60, warmup_s=0, seed=0)
    assert (alone.warmup, alone.samples_ms.max()) == (3, 1.0)


def test_timing_ends_at_the_tolerance_and_says_so() -> None:
    baseline, candidate, _ = scripted(noisy(1, 1), noisy(1, 2))
    found = measure(baseline, candidate, tolerance=0.005, max_pairs=100_000)
    low, high = found.ratio_ci95
    assert found.converged
    assert (high - low) / 2 <= 0.005
    assert 40 <= len(found.samples_ms) < 2000


def test_a_budget_that_runs_out_leaves_enough_pairs_and_says_not_converged() -> None:
    baseline, candidate, _ = scripted(noisy(1, 1, 0.3), noisy(1, 2, 0.3))
    found = timing.paired(baseline, candidate, tolerance=0.001, budget_s=0, warmup_s=0, seed=0)
    assert not found.converged
    assert len(found.samples_ms) == 40
    assert not found.candidate(MACHINE).converged
    alone = timing.single(baseline, tolerance=0.001, budget_s=0, warmup_s=0, seed=0)
    assert (alone.converged, len(alone.samples_ms)) == (False, 40)


def test_one_engine_alone_gives_its_median_with_an_interval() -> None:
    lone, _, _ = scripted(noisy(5, 1), noisy(1, 1))
    found = timing.single(lone, tolerance=0.002, budget_s=60, warmup_s=0, seed=0)
    low, high = found.median_ci95_ms
    assert found.converged
    assert low < 5 < high
    assert (high - low) / 2 <= 0.002 * 5.1
    assert found.latency(MACHINE).median_ms == timing.median(found.samples_ms)


def test_garbage_is_not_collected_while_timing_and_is_again_afterwards() -> None:
    seen: list[bool] = []

    def looking(_: list[str]) -> float:
        seen.append(gc.isenabled())
        return 1.0

    baseline, candidate, _ = scripted(looking, looking)
    measure(baseline, candidate)
    assert not any(seen)
    assert gc.isenabled()


def hold(device: str, held: ProcessEvent, release: ProcessEvent) -> None:
    with timing.device_lock(device):
        held.set()
        release.wait(60)


@pytest.fixture
def device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))  # for the processes started here
    return "cpu"


def test_the_lock_waits_for_a_process_that_measures_and_says_so_once(device: str) -> None:
    context = multiprocessing.get_context("spawn")
    held, release = context.Event(), context.Event()
    holder = context.Process(target=hold, args=(device, held, release))
    holder.start()
    assert held.wait(30)
    waited: list[bool] = []

    def told() -> None:
        waited.append(True)
        release.set()

    with timing.device_lock(device, on_wait=told):
        assert waited == [True]
    holder.join(30)
    assert holder.exitcode == 0


def test_the_lock_of_a_process_that_was_killed_is_free(device: str) -> None:
    context = multiprocessing.get_context("spawn")
    held, release = context.Event(), context.Event()
    holder = context.Process(target=hold, args=(device, held, release))
    holder.start()
    assert held.wait(30)
    assert holder.pid is not None
    os.kill(holder.pid, signal.SIGKILL)
    holder.join(30)
    with timing.device_lock(device, on_wait=lambda: pytest.fail("waited for a dead process")):
        pass


def test_devices_do_not_wait_for_each_other(device: str) -> None:
    refuse = lambda: pytest.fail("waited for another device")  # noqa: E731
    with timing.device_lock(device), timing.device_lock("cuda:0", on_wait=refuse):
        pass


def test_the_spread_between_sessions_widens_an_interval_as_independent_errors_add() -> None:
    spread = 1.96 * timing.SESSION_SD * 0.8
    low, high = timing.with_session_spread(0.8, (0.8 - 3 * spread, 0.8 + 4 * spread))
    assert (0.8 - low, high - 0.8) == pytest.approx((10**0.5 * spread, 17**0.5 * spread))
    low, high = timing.with_session_spread(0.8, (0.8, 0.8))
    assert (0.8 - low, high - 0.8) == pytest.approx((spread, spread))


class OnGpu(Scripted):
    """A scripted session with transfers, and a device whose state is given."""

    headline = "GPU Compute Time"
    notes: tuple[str, ...] = ("CUDA graph",)

    def __init__(self, enqueue_ms: float, device: DeviceState, spread: float = 0.0) -> None:
        super().__init__([], "G", noisy(2.0, 0, spread))
        self.enqueue_ms, self.device = enqueue_ms, device

    def sample(self) -> Sample:
        return Sample(super().sample().compute_ms, self.enqueue_ms, h2d_ms=0.5, d2h_ms=0.25)

    def state(self) -> DeviceState | None:
        return self.device


COOL = DeviceState(1980, 3201, 45)


def alone_on_gpu(session: OnGpu) -> Latency:
    return timing.single(session, tolerance=0, budget_s=60, warmup_s=0, seed=0, max_samples=40).latency(
        MACHINE
    )


def test_a_gpus_copies_stand_beside_its_compute_time_and_add_up_to_the_whole() -> None:
    found = alone_on_gpu(OnGpu(0.1, COOL))
    assert (found.headline, found.notes) == ("GPU Compute Time", ("CUDA graph",))
    assert (found.median_ms, found.enqueue_ms, found.h2d_ms, found.d2h_ms) == (2.0, 0.1, 0.5, 0.25)
    assert found.end_to_end_ms == 2.75
    assert (found.before, found.after, found.warnings) == (COOL, COOL, ())


def test_both_sides_of_a_pair_keep_their_own_transfers() -> None:
    found = timing.paired(
        OnGpu(0.1, COOL), OnGpu(0.3, COOL), tolerance=0, budget_s=60, warmup_s=0, seed=0, max_pairs=40
    )
    assert found.transfers_ms.shape == (40, 2, 3)
    assert found.baseline(MACHINE).enqueue_ms == 0.1
    assert found.candidate(MACHINE).enqueue_ms == 0.3


def test_a_processor_has_no_copies_to_report() -> None:
    session, _, _ = scripted(noisy(1.0, 0, 0.5), noisy(1.0, 0))
    found = timing.single(session, tolerance=0, budget_s=60, warmup_s=0, seed=0, max_samples=40)
    latency = found.latency(MACHINE)
    assert (latency.enqueue_ms, latency.end_to_end_ms, latency.warnings) == (None, None, ())


@pytest.mark.parametrize(
    ("session", "warning"),
    [
        (OnGpu(0.1, COOL, spread=0.1), "coefficient of variation"),
        (OnGpu(1.9, COOL), r"time to enqueue \(1\.900 ms\) is above 0\.8"),
        (
            OnGpu(0.1, DeviceState(1200, 3201, 88, 700.0, ("thermal",))),
            r"throttled \(thermal; 1200 MHz at 88 C",
        ),
    ],
)
def test_figures_of_a_gpu_that_may_mislead_come_with_the_reason(session: OnGpu, warning: str) -> None:
    (found,) = alone_on_gpu(session).warnings
    assert re.search(warning, found)


def test_who_waits_for_a_device_says_for_whom(device: str) -> None:
    context = multiprocessing.get_context("spawn")
    held, release = context.Event(), context.Event()
    holder = context.Process(target=hold, args=(device, held, release))
    holder.start()
    assert held.wait(30)
    told: list[str] = []

    def tell(line: str) -> None:
        told.append(line)
        release.set()

    with locks.telling(tell), timing.device_lock(device):
        assert told == [f"waiting for process {holder.pid}, which measures on cpu"]
    holder.join(30)


def test_a_lock_that_cannot_be_made_is_explained(device: str, tmp_path: Path) -> None:
    (tmp_path / "optpipe-cpu.lock").mkdir()
    with pytest.raises(RunError) as caught, timing.device_lock(device):
        pytest.fail("it measures without a lock")
    assert str(caught.value) == (
        f"{tmp_path / 'optpipe-cpu.lock'}: cannot be made or locked (Is a directory), and by this file "
        "processes that measure on cpu keep out of each other's way; set TMPDIR to a folder that can be "
        "written"
    )
