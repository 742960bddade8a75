"""A request counts once, however often vLLM asks for it, and a hit is what the engine was served. No engine runs."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from kvkern.integrations.vllm import shim
from kvkern.integrations.vllm.manager import PIN_STEPS
from tests.integrations.vllm.test_manager import Bench, bench

__all__ = ["bench"]
pytestmark = pytest.mark.vllm


def ask(bench: Bench, context: Any, keys: list[shim.OffloadKey]) -> list[shim.LookupResult]:
    bench.manager.lookup(keys[0], context)
    bench.cache.answer()
    return [bench.manager.lookup(key, context) for key in keys]


def counts(bench: Bench) -> tuple[int, int]:
    return bench.cache.counters.lookup_chunks, bench.cache.counters.hit_chunks


def load(bench: Bench, context: Any, keys: list[shim.OffloadKey]) -> int:
    return bench.manager.prepare_load(keys, context).ticket  # type: ignore[attr-defined,no-any-return]


def test_a_request_that_waits_for_long_counts_once(bench: Bench) -> None:
    bench.store("first")
    context, keys = bench.request("second")
    for _ in range(20 * PIN_STEPS):
        assert ask(bench, context, keys) == [shim.LookupResult.HIT] * 3
        bench.step()
    assert len(bench.cache.asked) > 10
    assert counts(bench) == (0, 0)
    bench.manager.end_transfer(load(bench, context, keys))
    assert counts(bench) == (3, 3)


def test_what_the_engine_has_itself_counts_as_nothing(bench: Bench) -> None:
    bench.store("first")
    context, keys = bench.request("second")
    ask(bench, context, keys[1:])
    bench.manager.end_transfer(load(bench, context, keys[1:]))
    assert counts(bench) == (2, 2)


def test_a_request_without_a_load_counts_no_hit(bench: Bench) -> None:
    """Found chunks that vLLM does not load are no hits. Chunks behind a miss were asked for."""
    bench.store("first")
    for name, asked in (("all", 3), ("first miss", 1)):
        context, keys = bench.request(name)
        ask(bench, context, keys[:asked])
        before = counts(bench)
        bench.manager.on_schedule_end(SimpleNamespace(new_req_ids=[name]))  # type: ignore[arg-type]
        assert counts(bench) == (before[0] + 3, 0)
    context, keys = bench.request("aborted")
    ask(bench, context, keys)
    bench.manager.on_request_finished(context)
    assert counts(bench) == (6, 0)


@pytest.mark.parametrize(("engine_tokens", "lookups"), [(0, 3), (16, 2), (32, 1), (48, 0)])
def test_what_the_engine_has_by_the_time_it_schedules_counts_as_nothing(
    bench: Bench, engine_tokens: int, lookups: int
) -> None:
    """Another request computes the same prompt while this one waits."""
    context, keys = bench.request("second")
    bench.manager.note_engine_hit("second", 0)
    assert ask(bench, context, keys[:1]) == [shim.LookupResult.MISS]
    bench.manager.note_engine_hit("second", engine_tokens)
    if rest := keys[engine_tokens // 16 :]:
        ask(bench, context, rest[:1])
    bench.manager.on_schedule_end(SimpleNamespace(new_req_ids=["second"]))  # type: ignore[arg-type]
    assert counts(bench) == (lookups, 0)
    reasons = bench.manager.get_stats().data["data"]["kvkern:not_loaded_requests"]  # type: ignore[union-attr]
    assert reasons["not_found",] == (lookups > 0)


@pytest.mark.parametrize(("prompt_tokens", "lookups"), [(48, 0), (50, 1)])
def test_a_last_chunk_that_vllm_finds_and_leaves_counts_as_nothing(
    bench: Bench, prompt_tokens: int, lookups: int
) -> None:
    bench.store("first")
    context, keys = bench.request("second")
    bench.manager.request("second").num_prompt_tokens = prompt_tokens  # type: ignore[union-attr]
    bench.manager.note_engine_hit("second", 32)
    assert ask(bench, context, keys[2:]) == [shim.LookupResult.HIT]
    bench.manager.on_schedule_end(SimpleNamespace(new_req_ids=["second"]))  # type: ignore[arg-type]
    assert counts(bench) == (lookups, 0)
    reasons = bench.manager.get_stats().data["data"]["kvkern:not_loaded_requests"]  # type: ignore[union-attr]
    assert reasons["not_used",] == lookups


@pytest.mark.parametrize("how", ["bad chunk", "failed in a worker"])
def test_a_load_that_fails_counts_no_hit(bench: Bench, how: str) -> None:
    bench.store("first")
    context, keys = bench.request("second")
    ask(bench, context, keys)
    ticket = load(bench, context, keys)
    if how == "bad chunk":
        lease = bench.manager._tickets._owned[ticket][0]
        bench.arena.mark_bad(lease.slots[1])  # type: ignore[arg-type]
    else:
        bench.manager.note_failed_load("second")
    bench.manager.end_transfer(ticket)
    assert counts(bench) == (3, 0)
