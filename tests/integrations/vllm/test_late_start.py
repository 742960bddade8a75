"""An engine of two ranks whose daemon comes after its start."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch

from kvkern.errors import ConfigError, LayoutError
from kvkern.integrations.vllm import shim
from kvkern.integrations.vllm.late_start import LateStart, NoCopier
from kvkern.integrations.vllm.packing import PackingReport, reported_arenas
from kvkern.integrations.vllm.shim import OffloadingWorkerMetadata
from kvkern.integrations.vllm.worker import KvkernWorker
from kvkern.integrations.vllm.worker_report import WorkerReport
from kvkern.node.client.cache_client import NodeClient
from tests.integrations.vllm.engine import Engine, prompt
from tests.integrations.vllm.multi_engine import MultiEngine
from tests.node.conftest import Daemon, eventually

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(400)]


def test_two_ranks_get_their_copiers_when_the_daemon_comes(llama: str, tmp_path: Path) -> None:
    """Until both have reported, nothing is asked for or stored; then a prompt hits, bit for bit what was computed."""
    daemon = Daemon(tmp_path, "64MiB")
    options = {"socket": str(daemon.socket), "connect_s": 0}
    try:
        with Engine(llama, kvkern_options=options, tensor_parallel_size=2) as engine:
            manager = engine.scheduler.connector._manager
            assert manager.ranks.absent() == [0, 1]
            text = prompt(300, 1)
            computed = engine.one(text)
            assert engine.cache.counters.stored_chunks == 0
            assert not engine.cache.connected
            daemon.start()

            def arrived() -> bool:
                engine.one(prompt(40, 2), tokens=1)  # workers report in steps
                return not manager.ranks.absent() and engine.cache.connected

            eventually(arrived, "both ranks have arrived")
            engine.reset_native()
            assert engine.one(text).cached_tokens == 0  # nothing of the time before is there
            eventually(lambda: engine.cache.counters.stored_chunks >= 9, "the prompt is stored")
            engine.reset_native()
            hit = engine.one(text)
            assert (hit.cached_tokens, hit.tokens, hit.logprobs) == (288, computed.tokens, computed.logprobs)
            assert engine.cache.counters.bad_chunks == 0
    finally:
        daemon.close()


def test_inside_multi_connector_ranks_report_in_steps(llama: str, tmp_path: Path) -> None:
    """There is no handshake of kvkern's there. A rank with another arena than the scheduler's gets nothing to do."""
    daemon = Daemon(tmp_path, "64MiB")
    options = {"socket": str(daemon.socket), "connect_s": 0}
    try:
        with MultiEngine(llama, tmp_path / "prompts", kvkern_first=True, kvkern=options) as engine:
            ranks = engine.manager.ranks
            assert ranks.absent() == []
            engine.one(prompt(40, 2), tokens=2)
            assert ranks.absent() == [0]
            daemon.start()

            def arrived() -> bool:
                engine.one(prompt(40, 2), tokens=2)
                return not ranks.absent() and engine.cache.connected

            eventually(arrived, "the rank has arrived")
            assert ranks._reported == {0: engine.cache.arena.file_id()}
            text = prompt(300, 1)
            engine.one(text)
            eventually(lambda: engine.cache.counters.stored_chunks >= 9, "the prompt is stored")
            engine.forget_other()
            assert engine.without_native(text).cached_tokens == 288
            ranks.note({0: (1, 1)})
            stored = engine.cache.counters.stored_chunks
            engine.forget_other()
            assert engine.without_native(text).cached_tokens == 0
            engine.settle()
            assert engine.cache.counters.stored_chunks == stored
    finally:
        daemon.close()


def test_reports_of_ranks_are_merged() -> None:
    first, second = WorkerReport(arenas={0: (1, 2)}), WorkerReport(arenas={1: ()})
    assert first.aggregate(second).arenas == {0: (1, 2), 1: ()}
    assert first.aggregate(OffloadingWorkerMetadata()).arenas == {0: (1, 2)}
    assert reported_arenas([PackingReport("x", 0, (1, 2)), PackingReport("x", 1), None]) == {0: (1, 2), 1: ()}


def test_without_a_copier_every_job_has_failed() -> None:
    absent = NoCopier()
    batch: Any = SimpleNamespace(slots=np.arange(3))
    for job in (absent.store([batch]), absent.load([batch, batch]), absent.load(()), absent.reject(np.arange(2))):
        assert job.done()
        assert len(job.ok)
        assert not job.ok.any()
        assert job.error is None
        assert (job.nbytes, job.seconds) == (0, 0.0)
    absent.close()


class Client:
    """Has an arena once `came` is set."""

    def __init__(self) -> None:
        self.came = threading.Event()

    def wait_for_arena(self, timeout_s: float) -> object | None:
        return self if self.came.wait(timeout_s) else None

    def file_id(self) -> tuple[int, int]:
        return 7, 8


def start(client: Client, build: Callable[[Any], Any]) -> tuple[LateStart, list[Any]]:
    handed: list[Any] = []
    late = LateStart(cast(NodeClient, client), build, lambda copier, arena: handed.append(copier))
    late.go_on()
    return late, handed


def test_a_copier_is_built_for_the_arena_that_came() -> None:
    client = Client()
    late, handed = start(client, lambda arena: ("copier of", arena))
    assert not handed
    client.came.set()
    eventually(lambda: handed, "the copier is handed over")
    late.stop()
    assert handed == [("copier of", client)]


def test_a_worker_that_ends_waits_for_no_daemon() -> None:
    late, handed = start(Client(), lambda arena: arena)
    late.stop()
    assert not handed


def test_a_copier_that_was_built_too_late_is_closed() -> None:
    """The worker ends while its copier is being proven: the arena is unmapped only when nobody touches it any more."""
    client, building, go_on, closed = Client(), threading.Event(), threading.Event(), threading.Event()

    def build(arena: Any) -> Any:
        building.set()
        assert go_on.wait(60)
        return SimpleNamespace(close=closed.set)

    late, handed = start(client, build)
    client.came.set()
    assert building.wait(60)
    stopping = threading.Thread(target=late.stop)
    stopping.start()
    eventually(late._stopped.is_set, "the worker ends")
    assert stopping.is_alive()
    go_on.set()
    stopping.join(60)
    assert closed.is_set()
    assert not handed


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (LayoutError("it does not fit"), "it does not fit"),
        (torch.OutOfMemoryError("CUDA out of memory"), "OutOfMemoryError('CUDA out of memory')"),
        (OSError(12, "Cannot allocate memory"), "OSError(12, 'Cannot allocate memory')"),
        (MemoryError(), "MemoryError()"),
    ],
)
def test_an_arena_that_cannot_be_used_is_one_line(monkeypatch: pytest.MonkeyPatch, error: Exception, said: str) -> None:
    found: list[str] = []
    monkeypatch.setattr(shim.logger, "error", lambda message, fields: found.append(message % fields))

    def build(arena: Any) -> Any:
        raise error

    client = Client()
    client.came.set()
    late, handed = start(client, build)
    eventually(lambda: found, "the line")
    late.stop()
    assert not handed
    assert f"cannot use it: {said}. The engine goes on without a cache" in found[0]


def test_nothing_is_built_before_the_first_step() -> None:
    """vLLM captures CUDA graphs then, and what another thread does on the GPU would spoil them."""
    client, built = Client(), threading.Event()
    client.came.set()
    worker = KvkernWorker(NoCopier(), 1, lambda: None)
    worker.start_late(cast(NodeClient, client), lambda arena: built.set() or cast(Any, SimpleNamespace(close=list)))
    assert not built.wait(0.2)
    assert (worker.take_arena(), worker.take_arena()) == ((), None)
    worker.begin_step()
    eventually(lambda: worker.connected and worker.arena, "the worker has its copier")
    assert (worker.take_arena(), worker.take_arena()) == ((7, 8), None)
    worker.begin_step()
    worker.shutdown()
    worker = KvkernWorker(NoCopier(), 1, lambda: None)
    worker.start_late(cast(NodeClient, client), lambda arena: pytest.fail("built"))
    worker.shutdown()  # an engine that never made a step


def test_a_sleeping_engine_builds_nothing() -> None:
    """Its KV cache has no memory. What is being built ends first, and a daemon that comes meanwhile waits for the next step."""
    client, building, go_on, held = Client(), threading.Event(), threading.Event(), threading.Event()

    def build(arena: Any) -> Any:
        building.set()
        assert go_on.wait(60)
        return arena

    late, handed = start(client, build)
    late.hold()
    client.came.set()
    assert not building.wait(0.2)
    late.go_on()
    assert building.wait(60)
    sleeping = threading.Thread(target=lambda: (late.hold(), held.set()))
    sleeping.start()
    assert not held.wait(0.2)
    go_on.set()
    assert held.wait(60)
    assert handed == [client]
    sleeping.join()
    late.stop()


def test_a_worker_that_ends_while_it_sleeps() -> None:
    client = Client()
    late, handed = start(client, lambda arena: arena)
    late.hold()
    client.came.set()
    late.stop()
    assert not handed


def test_open_cache_needs_its_daemon(tmp_path: Path) -> None:
    """An engine of one's own is told at once."""
    import kvkern
    from kvkern import layout

    kv = torch.zeros(2, 4, 16, 1, 8)
    with pytest.raises(ConfigError, match="no daemon answers on"):
        kvkern.open_cache(
            layout.flash_attention([kv]), [kv], model="m", weights="w", socket=str(tmp_path / "s"), connect_s=0
        )
