"""The calibration's operations run on a device and give a table that the planner can use."""

from __future__ import annotations

import numpy as np
import pytest

from kvkern.transfer.gpu.calibrate import calibrate, unmeasured
from kvkern.transfer.gpu.link_table import Abilities, Direction, HostLink, seed_calibration
from kvkern.transfer.gpu.planner import choose_method
from kvkern.transfer.gpu.stopwatch import Stopwatch
from tests.transfer.gpu.fake_device import POISON, FakeDevice, FakeStream
from tests.transfer.gpu.orders import Random


@pytest.mark.parametrize("able", [Abilities(), Abilities(batch_api=False, host_pointers=False)])
def test_every_possible_cost_is_measured(able: Abilities) -> None:
    device = FakeDevice(Random(0))
    watch = Stopwatch(device, able.batch_api, able.host_pointers)
    table = calibrate(watch, seed_calibration(HostLink(), able), budget_s=30)
    # times by a host's clock on busy cores mean little: this tests which operations run; only a GPU shows what they measure
    assert {"copy_gb_s", "copy_s", "launch_s"} - {name.split()[1] for name in unmeasured(table)}
    assert device.faults == []
    assert device.idle()
    for direction in Direction:
        assert choose_method(table, direction, 1 << 15, 1000, 1000 << 15).piece_nbytes > 0


def test_timed_operations_move_the_bytes_they_name() -> None:
    device = FakeDevice(Random(0))
    watch = Stopwatch(device, batch_api=True, host_pointers=True, warm_up=False)
    host, rows, pages = device.memories
    pages[:] = np.random.default_rng(0).integers(0, 256, len(pages), dtype=np.uint8)
    assert watch.zero_copy(Direction.D2H, 4, 1 << 20) > 0
    np.testing.assert_array_equal(host[: 1 << 20], pages[: 1 << 20])
    assert (host[1 << 20 :] == POISON).all()
    assert watch.relayout(Direction.D2H, 16, 4 << 20) > 0
    np.testing.assert_array_equal(rows[: 4 << 20], pages[: 4 << 20])
    assert watch.copy(Direction.D2H, 2 << 20) > 0
    np.testing.assert_array_equal(host[: 2 << 20], rows[: 2 << 20])
    assert watch.submit_batch(Direction.H2D, 128) > 0
    rows[:] = POISON
    host[:] = pages[: len(host)]
    assert watch.short_runs(Direction.H2D, 512) > 0
    runs = rows[: len(host)].reshape(512, 2, 16 << 10)
    np.testing.assert_array_equal(runs[:, 0], host.reshape(runs.shape)[:, 0])
    assert (runs[:, 1] == POISON).all()
    assert device.faults == []


def test_kernels_are_timed_behind_a_wait_and_batches_with_their_submission(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python's launch time is no part of a kernel's rate. The submission time of a batch is part of the batch's rate."""
    device, asked = FakeDevice(Random(0)), []
    watch = Stopwatch(device, batch_api=True, host_pointers=True, warm_up=False)
    monkeypatch.setattr(FakeStream, "seconds", lambda stream, work, behind_wait: asked.append(behind_wait) or 0.25)
    assert watch.relayout(Direction.H2D, 16, 1 << 20) == watch.zero_copy(Direction.H2D, 4, 1 << 20) == 0.25
    assert watch.copy(Direction.D2H, 1 << 20) == watch.short_runs(Direction.D2H, 2) == 0.25
    assert asked == [True, True, False, False]
