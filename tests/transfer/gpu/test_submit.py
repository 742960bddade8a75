"""Submission to a lane that is closed or broken, or that waits for a piece; and when a job reports released and done."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvkern.arena.slots import SlotState
from kvkern.transfer.base import Job
from kvkern.transfer.gpu.device import DeviceError
from kvkern.transfer.gpu.planner import Method
from kvkern.transfer.gpu.staging_rings import RingDepths
from tests.transfer.gpu.copier_rig import Rig, flash, rig
from tests.transfer.gpu.fake_device import FakeDevice, FakeEvent, FakeStream
from tests.transfer.gpu.orders import Random
from tests.transfer.gpu.store_load_programs import choosing


class CopiesHang(Random):
    """Gathers run at once, but their bytes stay on the device until `go` is set."""

    def __init__(self) -> None:
        super().__init__(0)
        self.go = threading.Event()

    def point(self, device: FakeDevice, label: str, ready: Callable[[], bool]) -> None:
        copies = device.streams.get("store.copies")
        while True:
            with device.lock:
                able = [s for s in device.enabled() if s is not copies or self.go.is_set()]
                if able:
                    device.run(able[0])
            if ready():
                return


def _comes_true(holds: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 10
    while not holds() and time.monotonic() < deadline:
        time.sleep(1e-3)
    return holds()


def test_blocks_are_free_before_the_bytes_have_crossed(tmp_path: Path) -> None:
    """A job is released after its gathers, and done only after its copies."""
    with rig(tmp_path, [flash()], choosing(Method.STAGED)) as bench:
        bench.device.order = order = CopiesHang()
        _, batch = bench.reserve("a", np.arange(6).reshape(2, 3))
        job = bench.copier.store([batch])
        assert _comes_true(job.released)
        assert not job.done()
        job.run_unclaimed()  # there is no unclaimed piece
        order.go.set()
        assert job.wait(60).ok.all()


def test_a_job_that_arrives_while_a_piece_is_in_flight_begins_at_once(tmp_path: Path) -> None:
    """The lane's thread waits for the first job's bytes. Meanwhile it gathers the second job's blocks, which are free then."""
    with rig(tmp_path, [flash()], choosing(Method.STAGED)) as bench:
        bench.device.order = order = CopiesHang()
        jobs = []
        for name in ("a", "b"):
            time.sleep(0.05)  # the lane's thread sleeps between two queries
            _, batch = bench.reserve(name, np.arange(6).reshape(2, 3))
            jobs.append(bench.copier.store([batch]))
            assert _comes_true(jobs[-1].released)
        assert not any(job.done() for job in jobs)
        order.go.set()
        assert all(job.wait(60).ok.all() for job in jobs)


def test_a_waiting_thread_queries_rarely(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It pauses for an eighth of the time waited so far, at most a millisecond. With a full window it does not query at all."""
    asked: list[float] = []
    query = FakeEvent.query

    def count(event: FakeEvent) -> bool:
        if event.device.agent != "engine":
            asked.append(time.perf_counter())
        return query(event)

    monkeypatch.setattr(FakeEvent, "query", count)
    for window, most in ((2, 150), (1, 0)):
        (folder := tmp_path / str(window)).mkdir()
        with rig(
            folder, [flash()], choosing(Method.STAGED), RingDepths(staging_nbytes=1 << 16, window=window)
        ) as bench:
            bench.device.order = order = CopiesHang()
            _, batch = bench.reserve("a", np.arange(6).reshape(2, 3))
            job = bench.copier.store([batch])
            assert _comes_true(job.released)
            time.sleep(0.1)
            seen = len(asked)
            order.go.set()
            assert job.wait(60).ok.all()
        assert seen <= most
        assert (seen > 0) == (most > 0)
        asked.clear()


def test_a_lane_thread_releases_the_device_whichever_thread_closes(tmp_path: Path) -> None:
    """A closing thread that is attached to no device, or to another one, stays as it is. The fixture checks what is left."""
    with rig(tmp_path, [flash()], choosing(Method.STAGED)) as bench:
        _, batch = bench.reserve("a", np.arange(6).reshape(2, 3))
        attached: list[str] = []
        attach = bench.device.attach
        bench.device.attach = lambda: (attached.append(threading.current_thread().name), attach())[1]  # type: ignore[method-assign]
        job = bench.copier.store([batch])
        thread = threading.Thread(target=bench.copier.close, name="closes")
        thread.start()
        thread.join()
        assert job.ok.all()
        assert bench.device.registered == {}
        assert "closes" not in attached


def test_streams_that_the_driver_does_not_destroy_do_not_stop_a_close(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuses(stream: FakeStream) -> None:
        raise DeviceError("cuStreamDestroy: CUDA_ERROR_ILLEGAL_ADDRESS (700)")

    with rig(tmp_path, [flash()], choosing(Method.STAGED)) as bench:
        with monkeypatch.context() as patch:
            patch.setattr(FakeStream, "close", refuses)
            bench.copier.close()
        assert "stream of the store lane cannot be destroyed: cuStreamDestroy" in caplog.text
        assert bench.device.registered == {}


def test_an_event_that_cannot_be_queried_fails_its_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As after a sticky fault: the job ends with the driver's message, and so does the next job."""

    def broken(event: FakeEvent) -> bool:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with rig(tmp_path, [flash()], choosing(Method.STAGED)) as bench:
        with monkeypatch.context() as patch:
            patch.setattr(FakeEvent, "query", broken)
            patch.setattr(FakeEvent, "synchronize", broken)
            jobs: list[Job] = []
            for name in ("a", "b"):
                _, batch = bench.reserve(name, np.arange(6).reshape(2, 3))
                jobs.append(bench.copier.store([batch]).wait(10))
        for job in jobs:
            assert job.done()
            assert "illegal memory access" in str(job.error)
            assert not job.ok.any()


def _closed(bench: Rig, monkeypatch: pytest.MonkeyPatch) -> type[Exception]:
    bench.copier.close()
    return RuntimeError


def _broken(bench: Rig, monkeypatch: pytest.MonkeyPatch) -> type[Exception]:
    def computed() -> None:
        raise DeviceError("an illegal memory access was encountered")

    monkeypatch.setattr(bench.device, "record_computed", computed)
    return DeviceError


def _ending(bench: Rig, monkeypatch: pytest.MonkeyPatch) -> type[Exception]:
    """Python begins to shut down in the middle of a submission: the executor takes 3 of 8 turns."""
    for executor in (bench.copier._stores, bench.copier._loads):
        taken, submit = iter(range(3)), executor.submit

        def some(*args: Any, taken: Any = taken, submit: Any = submit) -> Any:
            if next(taken, None) is None:
                raise RuntimeError("cannot schedule new futures after interpreter shutdown")
            return submit(*args)

        monkeypatch.setattr(executor, "submit", some)
    return RuntimeError


@pytest.mark.parametrize("fault", [_closed, _broken, _ending])
def test_a_submission_that_is_refused_is_an_error_of_its_job(
    tmp_path: Path, fault: Callable[..., type[Exception]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine's thread gets no exception, every piece ends, and the chunks that were to be loaded are dropped."""
    ids = np.arange(12).reshape(4, 3)
    with rig(tmp_path, [flash()], choosing(Method.STAGED, piece_nbytes=1)) as bench:
        bench.put("a", ids)
        lease, read = bench.leased("a", ids)
        reserved, write = bench.reserve("b", ids)
        with monkeypatch.context() as patch:
            kind = fault(bench, patch)
            jobs = [bench.copier.store([write]), bench.copier.load([read])]
        for job in jobs:
            assert job.wait(10).done()
            assert isinstance(job.error, kind)
            assert job.ok.tolist() == [False] * 4
            assert job.released()
            assert job.seconds > 0
        assert (bench.arena.headers["state"][read.slots] == SlotState.BAD).all()
        assert bench.cache.release(lease) == 4
        assert bench.cache.commit(reserved) == 0
        if fault is not _closed:
            bench.put("c", ids)
            assert bench.read("c", ids) == ([True] * 4, 0)
