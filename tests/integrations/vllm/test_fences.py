"""What vLLM 0.33 tells a connector: that its memory is about to be freed, and that a reset's transfers have ended.

kvkern's answers are there in every release. The tests call them where vLLM does not.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from kvkern.integrations.vllm import shim
from tests.integrations.vllm.engine import Engine, prompt

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(300)]


def _free_kv_memory(worker: Any) -> tuple[int, int, int]:
    """Run in a worker. Return the stores that wait for a step, before and after, and the jobs that are not done after."""
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    connector: Any = get_kv_transfer_group()
    waiting = connector.connector_worker._unsubmitted_store_jobs
    before = len(waiting)
    connector.unregister_kv_caches()
    jobs = shim.worker_of(connector)._jobs.values()
    return before, len(waiting), sum(not job.done() for job in jobs)


def _stop_while_storing(engine: Engine, tokens: list[int]) -> None:
    """Step until the first stores of the request "stopped" are planned."""
    engine.settle()
    engine.llm.llm_engine.add_request("stopped", {"prompt_token_ids": tokens}, engine.params(4))
    engine.steps(lambda: bool(engine.scheduler.connector._manager._tickets))


def _reset_while_storing(engine: Engine, tokens: list[int]) -> Any:
    """Return the connector, whose stores from before the reset have not been reported."""
    _stop_while_storing(engine, tokens)
    engine.llm.llm_engine.abort_request(["stopped"])
    assert engine.llm.reset_prefix_cache(reset_connector=True)
    connector = engine.scheduler.connector
    assert connector._manager._tickets.from_before_reset()
    return connector


@pytest.fixture(scope="module")
def running(llama: str) -> Iterator[Engine]:
    with Engine(llama) as engine:
        yield engine


def test_every_transfer_has_ended_before_the_memory_of_the_kv_cache_is_freed(running: Engine) -> None:
    """vLLM defers a step's stores to the next step. That one may come when the memory is another's."""
    text = prompt(700, 3)
    _stop_while_storing(running, text)
    ((before, waiting, undone),) = running.llm.collective_rpc(_free_kv_memory)
    assert before > 0
    assert (waiting, undone) == (0, 0)
    running.llm.llm_engine.abort_request(["stopped"])
    first = running.one(text)
    running.reset_native()
    hit = running.one(text)
    assert (hit.cached_tokens, hit.tokens) == (672, first.tokens)


@pytest.mark.skipif(
    not shim.FEATURES.reset_fence, reason="this vLLM has no reset fence (OffloadingManager has no on_reset_flushed)"
)
def test_vllm_says_when_the_transfers_of_a_reset_have_ended(running: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """What kvkern's own count of reports missed is freed then."""
    said: list[list[int]] = []
    manager = running.scheduler.connector._manager
    original = manager.on_reset_flushed
    monkeypatch.setattr(
        manager, "on_reset_flushed", lambda: (said.append(manager._tickets.from_before_reset()), original())
    )
    connector = _reset_while_storing(running, prompt(700, 5))
    lost = len(manager._tickets.from_before_reset())
    connector._transfers.clear()  # reports that kvkern does not understand
    running.settle()
    assert [len(tickets) for tickets in said] == [lost]
    assert running.accounted()


def test_the_end_of_a_reset_frees_what_its_transfers_hold(running: Engine) -> None:
    """Called directly, as in releases without a fence nobody calls it."""
    connector = _reset_while_storing(running, prompt(700, 6))
    manager = connector._manager
    connector._transfers.clear()  # reports that kvkern does not understand
    running.llm.collective_rpc(_free_kv_memory)
    manager.on_reset_flushed()
    assert not manager._tickets.from_before_reset()
    assert running.accounted()
    assert running.one(prompt(700, 6)).cached_tokens == 0
