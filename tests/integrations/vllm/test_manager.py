"""The manager over a cache that answers late, as a daemon may. No engine runs."""

from __future__ import annotations

from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import pytest

from kvkern.cache.manager import Cache
from kvkern.integrations.vllm import shim
from kvkern.integrations.vllm.manager import PIN_STEPS, STORE_STEPS, KvkernManager
from kvkern.integrations.vllm.request_state import KvGroup
from kvkern.integrations.vllm.spec import KvkernSpec
from kvkern.keys import Namespace
from kvkern.metrics import CacheCounters
from kvkern.observability.catalogue import PUBLISHED
from kvkern.policy.base import Use
from kvkern.policy.lru import LRU
from kvkern.tiers.base import Lease
from kvkern.tiers.dram import DramTier
from tests.support import chain_keys, make_arena, put, write

pytestmark = pytest.mark.vllm
SPACE = Namespace(model="m", dtype="bfloat16", layout="l", chunk_tokens=16, weights="w", group=None, engine_hash="h")


class SlowCache(Cache):
    """A cache that answers an `acquire_soon` only when `answer` is called."""

    slots_now = 99

    def __init__(self, dram: DramTier) -> None:
        super().__init__(dram)
        self.asked: list[tuple[Future[Lease], Any]] = []

    def acquire_soon(self, keys: Any, prefix: bool = True, use: Use | None = None) -> Future[Lease]:
        future: Future[Lease] = Future()
        self.asked.append((future, (keys, prefix, use)))
        return future

    def answer(self) -> None:
        for future, arguments in self.asked:
            if not future.done():
                future.set_result(super().acquire_soon(*arguments).result())

    def room(self, wanted: Any) -> int:
        return min(self.slots_now, len(wanted))


class Bench:
    """A manager, and requests of three chunks."""

    def __init__(self, folder: Any) -> None:
        self.arena = make_arena(folder, slots=8)
        self.context: dict[str, Any] = {}  # more fields of ReqContext, for the requests to come
        self.cache = SlowCache(DramTier(self.arena, LRU()))
        self.manager = KvkernManager(self.cache, [KvGroup(0, 1, 16)])
        self.manager.bind(lambda: SPACE, self)

    def request(self, name: str, salt: str | None = None, finished: bool = False) -> tuple[Any, list[shim.OffloadKey]]:
        hashes = [bytes([i]) * 32 for i in range(3)]
        context = SimpleNamespace(req_id=name, **self.context)
        self.manager.on_new_request(context)  # type: ignore[arg-type]
        request = SimpleNamespace(
            request_id=name,
            cache_salt=salt,
            block_hashes=hashes,
            num_output_tokens=9,
            output_token_ids=[5] * 9,
            num_prompt_tokens=50,
            kv_transfer_params=None,
            lora_request=None,
            session_id=None,
            sampling_params=None,
            status=shim.RequestStatus.FINISHED_STOPPED,
        )
        request.is_finished = lambda: finished
        self.manager.attach_request(request)  # type: ignore[arg-type]
        return context, [shim.make_offload_key(h, 0) for h in hashes]

    def holds(self, request: Any, key: shim.OffloadKey, end_tokens: int, tokens_per_hash: int) -> bool:
        """Prove every chunk whose end is right."""
        return bool(request.block_hashes[end_tokens // tokens_per_hash - 1] == key[:32])

    def store(self, name: str) -> None:
        context, keys = self.request(name)
        output = self.manager.prepare_store(keys, context)
        assert output is not None
        for reservation in self.manager._tickets._owned[output.store_spec.ticket]:  # type: ignore[attr-defined]
            write(self.arena, reservation)  # type: ignore[arg-type]
        self.manager.end_transfer(output.store_spec.ticket)  # type: ignore[attr-defined]
        self.manager.on_request_finished(context)

    def step(self) -> None:
        self.manager.on_schedule_end(SimpleNamespace(new_req_ids=()))  # type: ignore[arg-type]


@pytest.fixture
def bench(tmp_path: Any) -> Any:
    made = Bench(tmp_path)
    yield made
    made.arena.close()


def test_spoiled_stores_are_not_published_and_leave_no_slot(bench: Bench) -> None:
    """Another connector's load failed after the store of its blocks was planned. A later store is published again."""
    context, keys = bench.request("first")
    output = bench.manager.prepare_store(keys, context)
    assert output is not None
    ticket = output.store_spec.ticket  # type: ignore[attr-defined]
    for reservation in bench.manager._tickets._owned[ticket]:
        write(bench.arena, reservation)  # type: ignore[arg-type]
    bench.manager.spoil_stores()
    bench.manager.end_transfer(ticket)
    assert not bench.manager.has_pending_work()
    dram = bench.cache._dram
    assert (len(dram), dram.num_free) == (0, dram.num_slots)
    again = bench.manager.prepare_store(keys, context)
    assert again is not None
    assert again.keys_to_store == keys
    for reservation in bench.manager._tickets._owned[again.store_spec.ticket]:  # type: ignore[attr-defined]
        write(bench.arena, reservation)  # type: ignore[arg-type]
    bench.manager.end_transfer(again.store_spec.ticket)  # type: ignore[attr-defined]
    assert len(dram) == 3


def test_an_answer_that_takes_long_is_asked_for_once_and_then_used(bench: Bench) -> None:
    bench.store("first")
    context, keys = bench.request("second")
    for _ in range(5 * PIN_STEPS):
        assert bench.manager.lookup(keys[0], context) is shim.LookupResult.RETRY
        bench.step()
    assert len(bench.cache.asked) == 1
    bench.cache.answer()
    assert [bench.manager.lookup(key, context) for key in keys] == [shim.LookupResult.HIT] * 3
    for _ in range(PIN_STEPS):
        bench.step()
    assert (
        bench.manager.lookup(keys[0], context) is shim.LookupResult.HIT
    )  # pins expire PIN_STEPS steps after the answer, as for any request
    assert len(bench.cache.asked) == 1


@pytest.mark.parametrize("how", ["finished", "reset"])
def test_an_answer_that_comes_too_late_is_released(bench: Bench, how: str) -> None:
    bench.store("first")
    context, keys = bench.request("second")
    bench.manager.lookup(keys[0], context)
    if how == "finished":
        bench.manager.on_request_finished(context)
    else:
        bench.manager.reset_cache()
        assert bench.manager.lookup(keys[0], context) is shim.LookupResult.MISS  # its KV may be of other weights
    bench.cache.answer()
    assert not any(bench.cache._dram._pins)


def test_a_store_waits_for_slots_a_few_steps_and_then_takes_what_there_is(bench: Bench) -> None:
    context, keys = bench.request("first")
    bench.cache.slots_now = 0
    for _ in range(STORE_STEPS):
        output = bench.manager.prepare_store(keys[1:], context)  # vLLM logs and counts a failure for None
        assert output is not None
        assert output.keys_to_store == []
        assert bench.manager.take_postponed() == {"first": {0: 1}}
    output = bench.manager.prepare_store(keys, context)
    assert output is not None
    assert len(output.keys_to_store) == 3
    bench.cache.slots_now = 2
    part, keys = bench.request("part", "another tenant")
    output = bench.manager.prepare_store(keys, part)
    assert output is not None
    assert output.keys_to_store == keys[:2]
    assert bench.manager.take_postponed() == {"part": {0: 2}}
    assert bench.manager._requests["part"].store_waits == 0
    last, keys = bench.request("last", finished=True)  # vLLM asks only once for it
    output = bench.manager.prepare_store(keys, last)
    assert output is not None
    assert bench.manager.take_postponed() == {}


def test_tenants_and_resets_have_roots_of_their_own(bench: Bench) -> None:
    roots = [
        bench.request(f"r{i}", salt)[0] and bench.manager._requests[f"r{i}"].root
        for i, salt in enumerate((None, "a", "b", "a"))
    ]
    assert len(set(roots)) == 3
    assert roots[1] == roots[3]
    bench.manager.reset_cache()
    bench.request("after")
    assert bench.manager._requests["after"].root not in roots


def test_after_a_reset_no_store_is_given_anything_or_asked(bench: Bench) -> None:
    for private in (False, True):
        context, keys = bench.request(f"r{private}")
        bench.manager.lookup(keys[0], context)
        _, (_, _, use) = bench.cache.asked[-1]
        assert (use.namespace == b"") is private
        bench.cache.answer()
        bench.manager.lookup(keys[0], context)
        output = bench.manager.prepare_store(keys, context)
        assert output is not None
        assert len(output.keys_to_store) == 3
        slots = output.store_spec.groups[0].slots  # type: ignore[attr-defined]
        assert (bench.arena.headers["private"][slots] == private).all()
        bench.manager.reset_cache()


def test_the_policy_learns_which_calls_are_of_one_request_and_how_it_ended(bench: Bench) -> None:
    told: list[Use] = []
    policy = bench.cache._dram._policy
    access = policy.access
    policy.access = lambda chain, use: (told.append(use), access(chain, use))[1]  # type: ignore[method-assign,assignment]
    bench.store("first")
    context, keys = bench.request("second")
    bench.manager.lookup(keys[0], context)
    bench.cache.answer()
    bench.manager.lookup(keys[0], context)
    bench.manager.on_request_finished(context)
    assert [(use.request, use.output_tokens) for use in told] == [(1, -1), (1, 9), (2, -1), (2, 9)]


def test_a_request_whose_chunk_is_declined_stores_no_more(bench: Bench) -> None:
    """Chunks after a hole are unreachable."""
    put(bench.cache, bench.arena, chain_keys("other", 8))
    context, keys = bench.request("first")
    state, policy = bench.manager._requests["first"], bench.cache._dram._policy
    victims = policy.victims
    policy.victims = lambda count: [state.chains[0][1], *victims(count - 1)]  # type: ignore[method-assign]
    output = bench.manager.prepare_store(keys, context)
    assert output is not None
    assert output.keys_to_store == [keys[0], keys[2]]
    policy.victims = victims  # type: ignore[method-assign]
    output = bench.manager.prepare_store(keys, context)
    assert output is not None
    assert output.keys_to_store == []
    assert bench.cache.counters.declined_chunks == 1


def counted(bench: Bench) -> dict[str, float]:
    """Return what the manager has counted since the last call, without zeros: reasons, tiers and loads by name."""
    stats = bench.manager.get_stats()
    data = {} if stats is None else stats.data["data"]
    series = {
        f"{name.removeprefix('kvkern:')} {' '.join(labels)}".strip(): value
        for name, by_labels in data.items()
        for labels, value in by_labels.items()
    }
    return {name: value for name, value in series.items() if isinstance(value, int | float) and value}


def schedule(bench: Bench, *names: str) -> None:
    bench.manager.on_schedule_end(SimpleNamespace(new_req_ids=list(names)))  # type: ignore[arg-type]


def test_a_request_counts_once_however_long_it_waits_and_says_why_it_loaded_nothing(bench: Bench) -> None:
    bench.store("first")
    counted(bench)
    for name, engine_tokens, reason in (("a", 0, "not_used"), ("b", 16, "not_used"), ("c", 48, "")):
        context, keys = bench.request(name)
        for _ in range(5):  # vLLM asks in every step until it has blocks for the request
            bench.manager.note_engine_hit(name, engine_tokens)
            if engine_tokens < 48:
                bench.manager.lookup(keys[engine_tokens // 16], context)
                bench.cache.answer()
            schedule(bench)
        for _ in range(3):
            schedule(bench, name)  # preempted, and scheduled again
        found = counted(bench)
        assert found["requests no"] == 1
        assert found["lookup_tokens vllm"] == 50
        assert found.get("hit_tokens vllm", 0) == engine_tokens
        assert found["lookup_tokens dram"] == 50 - engine_tokens
        assert {name for name in found if name.startswith("not_loaded")} == (
            {f"not_loaded_requests {reason}"} if reason else set()
        )


def test_a_missing_chunk_that_was_declined_says_so(bench: Bench) -> None:
    context, keys = bench.request("first")
    state, policy = bench.manager._requests["first"], bench.cache._dram._policy
    put(bench.cache, bench.arena, chain_keys("other", 8))
    victims = policy.victims
    policy.victims = lambda count: [*state.chains[0], *victims(count)]  # type: ignore[method-assign]
    assert bench.manager.prepare_store(keys, context) is not None
    policy.victims = victims  # type: ignore[method-assign]
    bench.manager.on_request_finished(context)
    counted(bench)
    context, keys = bench.request("second")
    bench.manager.lookup(keys[0], context)
    bench.cache.answer()
    assert bench.manager.lookup(keys[0], context) == shim.LookupResult.MISS
    schedule(bench, "second")
    assert counted(bench)["not_loaded_requests declined"] == 1


def test_a_fault_in_metrics_ends_no_engine(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise RuntimeError("a fault in this test")

    monkeypatch.setattr(bench.manager.meter, "take", fail)
    assert bench.manager.get_stats() is None
    assert bench.cache.counters.faults == 1


def test_only_own_metrics_are_exported() -> None:
    """And none that always stays at zero."""

    def names(**options: str | bool) -> set[str]:
        return set(KvkernSpec.build_metric_definitions({"spec_name": "KvkernSpec", "kvkern": options}))

    own, shared, stored = names(capacity="1GiB"), names(socket="/s"), names(capacity="1GiB", remote="file:///x")
    assert {"kvkern:hit_chunks", "kvkern:bad_chunks", "kvkern:faults"} < own & shared
    assert own - shared == {"kvkern:evicted_chunks", "kvkern:declined_chunks", "kvkern:arena_slots"}
    assert shared - own == {"kvkern:connected"}
    counted = CacheCounters().snapshot()
    of_stores = {f"kvkern:{name}" for name in counted if name.startswith("remote_")}
    assert of_stores < stored - own
    not_exported = {"kvkern:hit_ratio", "kvkern:cleared_chunks", "kvkern:trimmed_chunks"}
    assert {f"kvkern:{name}" for name in counted} - not_exported < stored
    published = names(socket="/s", published_metrics=True) - shared
    assert {metric.name for metric in PUBLISHED} == published
    assert len(published) == 17
