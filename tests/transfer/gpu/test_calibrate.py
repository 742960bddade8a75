"""The calibration of a device with known parameters: it recovers them within the budget, and marks those that it cannot."""

from __future__ import annotations

import logging
import random
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvkern.transfer.gpu import calibration_file
from kvkern.transfer.gpu.calibrate import (
    BUDGET_S,
    DEVICE_NBYTES,
    calibrate,
    load_or_calibrate,
    table_text,
    unmeasured,
    untried,
)
from kvkern.transfer.gpu.calibration_file import DeviceId
from kvkern.transfer.gpu.link_table import (
    GB,
    Abilities,
    Calibration,
    Costs,
    Direction,
    HostLink,
    Rate,
    seed_calibration,
)

DEVICE = DeviceId("Test GPU 80GB", "570.1", HostLink(5, 16))
SEEDS = seed_calibration(DEVICE.link)


def parameters(scale: float = 1.0) -> Costs:
    return Costs(
        copy_gb_s=47.0 * scale,
        copy_s=2.6e-6,
        call_s=3.3e-6,
        descriptor_s=0.62e-6,
        short_gb_s=19.0 * scale,
        launch_s=5.5e-6,
        zero_copy=(Rate(4, 13.0 * scale), Rate(8, 26.0 * scale), Rate(12, 37.0 * scale)),
        relayout=(Rate(16, 310.0 * scale), Rate(32, 590.0 * scale)),
    )


@dataclass
class Synthetic:
    """A device with its own clock: every operation takes the time that its costs give, plus noise."""

    d2h: Costs = field(default_factory=parameters)
    h2d: Costs = field(
        default_factory=lambda: replace(parameters(), copy_gb_s=51.0, descriptor_s=0.55e-6, short_gb_s=6.4)
    )
    noise: float = 0.0  # adds up to this part of the time, and microseconds with this mean
    overhead_s: float = 6e-6  # of every operation that is timed until done
    stall_every: int = 0  # every n-th operation takes 300 us more
    seed: int = 1
    now_s: float = 100.0
    asked: list[tuple[str, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)

    def clock(self) -> float:
        return self.now_s

    def _took(self, what: str, size: int, seconds: float) -> float:
        self.asked.append((what, size))
        seconds *= 1 + self.noise * self._random.random()
        seconds += self.noise * self._random.expovariate(1.0) * 1e-6
        if self.stall_every and len(self.asked) % self.stall_every == 0:
            seconds += 300e-6
        self.now_s += seconds + 2e-6  # Python between operations
        return seconds

    def _costs(self, direction: Direction) -> Costs:
        return self.d2h if direction is Direction.D2H else self.h2d

    def copy(self, direction: Direction, nbytes: int) -> float:
        return self._took("copy", nbytes, self.overhead_s + nbytes / self._costs(direction).copy_gb_s / GB)

    def submit_copy(self, direction: Direction) -> float:
        return self._took("submit_copy", 1, self._costs(direction).copy_s)

    def submit_batch(self, direction: Direction, count: int) -> float:
        costs = self._costs(direction)
        return self._took("submit_batch", count, costs.call_s + count * costs.descriptor_s)

    def short_runs(self, direction: Direction, count: int) -> float:
        costs = self._costs(direction)
        return self._took("short_runs", count, costs.call_s + count * (16 << 10) / costs.short_gb_s / GB)

    def launch(self) -> float:
        return self._took("launch", 1, self.d2h.launch_s)

    def zero_copy(self, direction: Direction, ctas: int, nbytes: int) -> float:
        (rate,) = (r for r in self._costs(direction).zero_copy if r.ctas == ctas)
        return self._took("zero_copy", nbytes, self.overhead_s + nbytes / rate.gb_s / GB)

    def relayout(self, direction: Direction, ctas: int, nbytes: int) -> float:
        (rate,) = (r for r in self._costs(direction).relayout if r.ctas == ctas)
        return self._took("relayout", nbytes, self.overhead_s + nbytes / rate.gb_s / GB)


def assert_close(found: Costs, want: Costs, within: float) -> None:
    for name in ("copy_gb_s", "copy_s", "call_s", "descriptor_s", "short_gb_s", "launch_s"):
        assert getattr(found, name) == pytest.approx(getattr(want, name), rel=within), name
    for name in ("zero_copy", "relayout"):
        rates = getattr(want, name)
        assert [rate.ctas for rate in getattr(found, name)] == [rate.ctas for rate in rates]
        for mine, its in zip(getattr(found, name), rates, strict=True):
            assert mine.gb_s == pytest.approx(its.gb_s, rel=within), (name, its.ctas)


def test_a_quiet_device_is_recovered() -> None:
    device = Synthetic()
    table = calibrate(device, SEEDS, clock=device.clock)
    assert_close(table.d2h, device.d2h, 1e-6)
    assert_close(table.h2d, device.h2d, 1e-6)
    assert unmeasured(table) == []
    assert device.now_s - 100.0 < BUDGET_S
    assert max(size for _, size in device.asked) <= DEVICE_NBYTES


@pytest.mark.parametrize("seed", range(20))
def test_a_noisy_device_is_recovered_within_a_few_percent(seed: int) -> None:
    device = Synthetic(noise=0.03, seed=seed, stall_every=17)
    table = calibrate(device, SEEDS, clock=device.clock)
    assert_close(table.d2h, device.d2h, 0.06)
    assert_close(table.h2d, device.h2d, 0.06)
    assert unmeasured(table) == []
    assert device.now_s - 100.0 < BUDGET_S + 320e-6  # the last operation may stall


def test_a_slow_device_ends_in_time_and_keeps_seeds() -> None:
    """On a link such as PCIe 3 x1 large copies do not fit the budget."""
    slow = replace(parameters(0.02), relayout=parameters().relayout)
    device = Synthetic(d2h=slow, h2d=slow)
    table = calibrate(device, SEEDS, clock=device.clock)
    assert device.now_s - 100.0 < BUDGET_S * 1.25
    left = unmeasured(table)
    assert left
    for name in left:
        direction, what = name.split()
        assert getattr(table.costs(Direction(direction)), what) == getattr(SEEDS.costs(Direction(direction)), what)
    for direction in Direction:
        for what in table.costs(direction).measured:
            assert f"{direction} {what}" not in left


@given(st.floats(0.0005, 2.0), st.floats(1e-5, 0.05), st.floats(0, 0.5), st.integers(0, 50), st.integers(0, 2**31))
@settings(max_examples=60)
def test_any_budget_is_kept_but_for_one_operation(
    scale: float, budget_s: float, noise: float, stall_every: int, seed: int
) -> None:
    device = Synthetic(parameters(scale), parameters(scale), noise, stall_every=stall_every, seed=seed)
    calls: list[float] = []
    took = device._took
    device._took = lambda *args: calls.append(took(*args)) or calls[-1]  # type: ignore[assignment,func-returns-value]
    calibrate(device, SEEDS, budget_s, device.clock)
    assert device.now_s - 100.0 <= budget_s + max(calls, default=0.0) + 3e-6


def test_no_time_at_all() -> None:
    device = Synthetic()
    table = calibrate(device, SEEDS, budget_s=0.0, clock=device.clock)
    assert table == SEEDS
    assert device.asked == []
    assert len(unmeasured(table)) == 16


@pytest.mark.parametrize("stopped", [0.0, -1e-6])
def test_a_clock_that_sees_nothing_measures_nothing(stopped: float) -> None:
    class Stopped(Synthetic):
        def _took(self, what: str, size: int, seconds: float) -> float:
            super()._took(what, size, seconds)
            return stopped

    device = Stopped()
    assert calibrate(device, SEEDS, clock=device.clock) == SEEDS


@pytest.mark.parametrize(("able", "never"), [
    (Abilities(batch_api=False), {"submit_batch", "short_runs"}),
    (Abilities(host_pointers=False), {"zero_copy"}),
    (Abilities(pinned=False), {"submit_batch", "short_runs", "zero_copy", "relayout", "launch"}),
])  # fmt: skip
def test_impossible_operations_are_not_measured(able: Abilities, never: set[str]) -> None:
    device = Synthetic()
    table = calibrate(device, seed_calibration(DEVICE.link, able), clock=device.clock)
    assert never.isdisjoint(what for what, _ in device.asked)
    assert unmeasured(table) == []
    assert table.abilities == able


# -- across starts ---------------------------------------------------------------------------------------------------------


def start(device: Synthetic, folder: Path, able: Abilities = SEEDS.abilities, who: DeviceId = DEVICE) -> Calibration:
    return load_or_calibrate(lambda: device, who, able, folder, clock=device.clock)


def test_the_next_start_measures_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "kvkern")
    first = start(Synthetic(), tmp_path)
    again = Synthetic()
    assert start(again, tmp_path) == first
    assert again.asked == []
    assert "Test GPU 80GB, PCIe 5 x16, driver 570.1" in caplog.text
    assert "47.0 GB/s" in caplog.text

    def unwanted() -> Synthetic:
        raise AssertionError("the device was made, which compiles kernels and takes memory")

    assert load_or_calibrate(unwanted, DEVICE, SEEDS.abilities, tmp_path) == first


@pytest.mark.parametrize("other", [
    replace(DEVICE, driver="580.1"), replace(DEVICE, name="Other"), replace(DEVICE, link=HostLink(4, 16)),
    replace(DEVICE, link=HostLink(5, 8)), replace(DEVICE, link=HostLink(5, 16, c2c=True)),
    replace(DEVICE, gpu_node=1), replace(DEVICE, cpu_nodes=(1,)),
])  # fmt: skip
def test_another_device_is_measured(tmp_path: Path, other: DeviceId) -> None:
    start(Synthetic(), tmp_path)
    device = Synthetic()
    start(device, tmp_path, who=other)
    assert device.asked


def test_new_abilities_are_measured(tmp_path: Path) -> None:
    start(Synthetic(), tmp_path, Abilities(host_pointers=False))
    device = Synthetic()
    table = start(device, tmp_path)
    assert device.asked
    assert unmeasured(table) == []
    fewer = Synthetic()
    assert start(fewer, tmp_path, Abilities(batch_api=False)).abilities == Abilities(batch_api=False)
    assert fewer.asked == []


def test_an_incomplete_measurement_is_warned_of_once_and_not_repeated(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    slow = parameters(0.001)
    table = start(Synthetic(slow, slow), tmp_path)
    assert "did not measure everything well within 20 ms, so estimates are used for: d2h " in caplog.text
    assert str(calibration_file.path_of(DEVICE, tmp_path)) in caplog.text  # the file to delete
    assert "~" in table_text(table)
    assert unmeasured(table) != []
    assert untried(table) == []
    caplog.clear()
    again = Synthetic()
    assert start(again, tmp_path) == table
    assert again.asked == []
    assert not caplog.records
    calibration_file.path_of(DEVICE, tmp_path).unlink()
    assert unmeasured(start(again, tmp_path)) == []


def test_untried_costs_are_measured_later(tmp_path: Path) -> None:
    """A newer driver has batch copies, on a device whose other costs could not be measured."""
    slow = parameters(0.001)
    start(Synthetic(slow, slow), tmp_path, Abilities(batch_api=False))
    device = Synthetic(slow, slow)
    assert untried(start(device, tmp_path)) == []
    assert device.asked


def test_rounds_that_disagree_are_no_measurement() -> None:
    """A thread may wake up late, or L2 may hold half of the bytes: no rate is better than a wrong rate."""

    class Unsteady(Synthetic):
        def relayout(self, direction: Direction, ctas: int, nbytes: int) -> float:
            return super().relayout(direction, ctas, nbytes) + len(self.asked) * 1e-6

    device = Unsteady()
    table = calibrate(device, SEEDS, clock=device.clock)
    assert unmeasured(table) == ["d2h relayout", "h2d relayout"]
    assert table.h2d.relayout == SEEDS.h2d.relayout


def test_waiting_time_counts_against_the_budget() -> None:
    """The device's clock does not see the waiting time."""

    class Waiting(Synthetic):
        def _took(self, what: str, size: int, seconds: float) -> float:
            self.now_s += 1e-3
            return super()._took(what, size, seconds)

    device = Waiting()
    calibrate(device, SEEDS, clock=device.clock)
    assert device.now_s - 100.0 < BUDGET_S + 1e-3


def test_ranks_measure_one_after_the_other(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The first rank measures, and the others read its saved table. A rank with another GPU measures after it."""
    inside, most, devices = [0], [0], []

    def make(device: Synthetic) -> Synthetic:
        inside[0] += 1
        most[0] = max(most[0], inside[0])
        time.sleep(0.05)
        inside[0] -= 1
        devices.append(device)
        return device

    def rank(number: int) -> Calibration:
        device, who = Synthetic(), DEVICE if number < 3 else replace(DEVICE, gpu_node=1)
        return load_or_calibrate(lambda: make(device), who, SEEDS.abilities, tmp_path, clock=device.clock)

    with ThreadPoolExecutor(6) as pool:
        tables = list(pool.map(rank, range(6)))
    assert (len(devices), most[0]) == (2, 1)
    assert all(table == tables[0] for table in tables)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_a_rank_that_does_not_get_the_lock_uses_estimates_for_one_start(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    device = Synthetic()
    with calibration_file.measuring_lock(tmp_path, 0):
        table = load_or_calibrate(lambda: device, DEVICE, SEEDS.abilities, tmp_path, clock=device.clock, wait_s=0.06)
    assert table == SEEDS
    assert device.asked == []
    assert "so this start uses estimates" in caplog.text
    assert unmeasured(start(device, tmp_path)) == []


def test_a_damaged_file_is_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = calibration_file.path_of(DEVICE, tmp_path)
    path.parent.mkdir()
    path.write_text("damaged")
    assert unmeasured(start(Synthetic(), tmp_path)) == []
    assert len([record for record in caplog.records if record.levelno >= logging.WARNING]) == 1


def test_the_table_marks_what_is_not_measured() -> None:
    device = Synthetic()
    table = calibrate(device, SEEDS, clock=device.clock)
    assert "~" not in table_text(table)
    lines = table_text(SEEDS).splitlines()
    assert len({len(line) for line in lines[1:]}) == 1  # aligned
    assert lines[1].split() == ["copy", "engine,", "one", "large", "copy", "~53.0", "GB/s", "~53.0", "GB/s"]
    assert "zero-copy" not in table_text(seed_calibration(DEVICE.link, Abilities(host_pointers=False)))
