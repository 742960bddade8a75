"""An engine of two ranks whose daemon comes after its start."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvkern.errors import ConfigError
from kvkern.integrations.vllm.packing import PackingReport, absent_ranks
from kvkern.integrations.vllm.shim import OffloadingWorkerMetadata
from kvkern.integrations.vllm.worker_report import WorkerReport
from tests.integrations.vllm.engine import Engine, prompt
from tests.node.conftest import Daemon, eventually

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(400)]


def test_two_ranks_get_their_copiers_when_the_daemon_comes(llama: str, tmp_path: Path) -> None:
    """Until both have reported, nothing is asked for or stored; then a prompt hits, bit for bit what was computed."""
    daemon = Daemon(tmp_path, "64MiB")
    options = {"socket": str(daemon.socket), "connect_s": 0}
    try:
        with Engine(llama, kvkern_options=options, tensor_parallel_size=2) as engine:
            manager = engine.scheduler.connector._manager
            assert manager.absent_workers == {0, 1}
            text = prompt(300, 1)
            computed = engine.one(text)
            assert engine.cache.counters.stored_chunks == 0
            assert not engine.cache.connected
            daemon.start()

            def arrived() -> bool:
                engine.one(prompt(40, 2), tokens=1)  # workers report in steps
                return not manager.absent_workers and engine.cache.connected

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


def test_reports_of_ranks_are_merged() -> None:
    first, second = WorkerReport(arrived={0}), WorkerReport(arrived={1})
    assert first.aggregate(second).arrived == {0, 1}
    assert first.aggregate(OffloadingWorkerMetadata()).arrived == {0}
    assert absent_ranks([PackingReport("x"), PackingReport("x", 1), None]) == {1}


def test_open_cache_needs_its_daemon(tmp_path: Path) -> None:
    """An engine of one's own is told at once."""
    import torch

    import kvkern
    from kvkern import layout

    kv = torch.zeros(2, 4, 16, 1, 8)
    with pytest.raises(ConfigError, match="no daemon answers on"):
        kvkern.open_cache(
            layout.flash_attention([kv]), [kv], model="m", weights="w", socket=str(tmp_path / "s"), connect_s=0
        )
