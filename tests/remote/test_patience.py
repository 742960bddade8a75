"""A slow or silent store costs a request at most one question and one window, and costs later requests nothing.

    TTFT with the store <= TTFT without it + the wait for one question + the wait for one window

The waits are so far apart that a busy machine cannot confuse them.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from kvkern.remote import cost_model, prefix_reader
from kvkern.remote import tier as tier_module
from kvkern.remote.circuit_breaker import FAILURES
from kvkern.remote.stores.base import RemoteError
from kvkern.remote.waiting_request import WaitingRequest
from tests.node.conftest import GEOMETRY, eventually
from tests.remote.nodes import USE, A, B, C, Node, node, nodes
from tests.remote.stores.memory import MemoryStore
from tests.support import NAMESPACE, SHAPE, chain_keys

LONG = chain_keys("long", 20)
COMPUTE_S = 60.0  # for six chunks, unless a test says otherwise: no request may wait so long
SOON_S = 15.0  # far less than COMPUTE_S, and more than a busy machine needs for a step of one second


class Stuck(MemoryStore):
    """A store whose calls of one kind hang or are slow, from the n-th call on."""

    def __init__(self, values: dict[bytes, bytes]) -> None:
        super().__init__(values)
        self.kind, self.first, self.seconds = "", 0, 0.0
        self.hangs: asyncio.Event | None = None

    async def _called(self, what: str, count: int) -> None:
        await super()._called(what, count)
        if what == self.kind and sum(called == what for called, _ in self.calls) > self.first:
            await asyncio.sleep(self.seconds)
            if self.hangs is not None:
                await asyncio.wait_for(self.hangs.wait(), 60.0)  # so that a failing test does not hang


@pytest.fixture
def values(tmp_path: Path) -> dict[bytes, bytes]:
    """A store that holds A, B, C and a long chain."""
    store = MemoryStore()
    with node(tmp_path, store, slots=64) as one:
        for chain in (A, B, C, LONG):
            one.compute(chain)
        one.settle()
    return store.values


@pytest.fixture
def store(values: dict[bytes, bytes]) -> Stuck:
    return Stuck(values)


def informed(node: Node, six_chunks_s: float = COMPUTE_S, ask_s: float = 0.001, read_s: float = 0.001) -> None:
    """Tell the node how long everything takes."""
    node.tier.outbox.chunk_tokens = SHAPE.chunk_tokens
    node.tier.note_prefill(6 * SHAPE.chunk_tokens / six_chunks_s)
    node.tier.costs.note_ask(ask_s)
    node.tier.costs.note_read(1000, 1000 * read_s)


def timed(call: Callable[[], int]) -> tuple[int, float]:
    began = time.monotonic()
    return call(), time.monotonic() - began


# -- a question --------------------------------------------------------------------------------------------------------


def test_a_hung_store_costs_one_request_and_nobody_else(tmp_path: Path, store: Stuck) -> None:
    with node(tmp_path, store, slots=64, timeout_s=300.0) as one:
        informed(one)
        store.kind, store.hangs = "exists", asyncio.Event()
        hits, took_s = timed(lambda: one.hits(A))
        assert hits == 0
        assert took_s < SOON_S
        eventually(lambda: one.tier._calls.stalled, "the mark")
        for chain in (A, B, C) * 30:
            answer = one.cache.acquire_soon(chain, True, USE)
            assert answer.done()  # it was answered without waiting
            one.cache.release(answer.result())
        assert one.counters["remote_unasked_chunks"] == 90 * 6
        assert store.calls.count(("exists", 6)) == 1
        one.tier._loop.call_soon_threadsafe(store.hangs.set)
        eventually(lambda: not one.tier._calls.stalled, "the end of the call")
        eventually(lambda: one.hits(A) == 6)


def test_requests_at_once_on_a_hung_store_wait_as_long_as_one(tmp_path: Path, store: Stuck) -> None:
    with node(tmp_path, store, slots=64, timeout_s=300.0) as one:
        informed(one)
        store.kind, store.hangs = "exists", asyncio.Event()
        began = time.monotonic()
        answers = [one.cache.acquire_soon(chain, True, USE) for chain in (A, B, C) * 10]
        for answer in answers:
            assert not answer.result(SOON_S).keys
            one.cache.release(answer.result())
        assert time.monotonic() - began < SOON_S
        one.tier._loop.call_soon_threadsafe(store.hangs.set)


def test_a_store_that_hangs_for_ever_costs_a_request_per_timeout_until_it_is_not_asked(
    tmp_path: Path, store: Stuck
) -> None:
    class TimingOut(Stuck):
        async def _called(self, what: str, count: int) -> None:
            await super()._called(what, count)
            if what == "exists":
                await asyncio.sleep(0.5)
                raise RemoteError("no answer in time")

    hung = TimingOut(store.values)
    with node(tmp_path, hung, slots=64) as one:
        informed(one)
        asked = 0
        while not one.tier.breaker.is_open:
            answer = one.cache.acquire_soon(A, True, USE)
            asked += not answer.done()
            one.cache.release(answer.result(SOON_S))
            time.sleep(0.01)
        assert (
            asked <= hung.calls.count(("exists", 6)) <= FAILURES + 2
        )  # on a busy machine two calls may fit between the begin of a call and its mark


def test_the_first_question_waits_for_a_share_of_computing(
    tmp_path: Path, store: Stuck, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cost_model, "FIRST_WAIT_S", 300.0)
    with node(tmp_path, store, slots=64, timeout_s=300.0) as one:
        one.tier.outbox.chunk_tokens = SHAPE.chunk_tokens
        one.tier.note_prefill(6 * SHAPE.chunk_tokens / 2.0)  # computing takes two seconds
        store.kind, store.hangs = "exists", asyncio.Event()
        hits, took_s = timed(lambda: one.hits(A))
        assert hits == 0
        assert took_s < SOON_S
        one.tier._loop.call_soon_threadsafe(store.hangs.set)


def test_questions_of_a_request_share_its_wait(tmp_path: Path, store: Stuck, monkeypatch: pytest.MonkeyPatch) -> None:
    """The keys it asks for lie on both sides of a read for another request, so it has to ask twice."""
    waits: list[float] = []
    wait = WaitingRequest.wait_at_most

    def noted(asked: WaitingRequest, seconds: float) -> None:
        waits.append(seconds)
        wait(asked, seconds)

    for name in ("LEAST_WAIT_S", "LONGEST_ASK_S", "LONGEST_WAIT_S"):
        monkeypatch.setattr(cost_model, name, 100.0)
    with node(tmp_path, store, slots=64) as one:
        informed(one, six_chunks_s=600.0)
        store.kind, store.hangs = "get", asyncio.Event()
        first = one.cache.acquire_soon(A, True, USE)
        eventually(lambda: ("get", 6) in store.calls, "the read of somebody else")
        monkeypatch.setattr(WaitingRequest, "wait_at_most", noted)
        store.kind, store.delay_s = "", 0.3
        second = one.cache.acquire_soon(B + A + C, True, USE)
        eventually(lambda: one.counters["remote_hit_chunks"] == 6, "its own first read")
        one.tier._loop.call_soon_threadsafe(store.hangs.set)
        for answer, chain in ((first, A), (second, B + A + C)):
            assert answer.result(60).keys == tuple(chain)
            one.cache.release(answer.result())
        asked = [count for what, count in store.calls if what == "exists"]
        assert asked == [6, 16, 2, 6]
        assert waits[0] == 100.0
        assert 0 < min(waits) <= 100.0 - 2 * 0.3


def test_what_is_slow_to_ask_is_not_asked_for_little(tmp_path: Path, store: Stuck) -> None:
    with node(tmp_path, store, slots=64) as one:
        informed(one, six_chunks_s=1.0, ask_s=0.5)
        answer = one.cache.acquire_soon(A, True, USE)
        assert answer.done()
        assert not answer.result().keys
        assert one.counters["remote_unasked_chunks"] == 6
        assert not [what for what, _ in store.calls if what == "exists"]
        one.tier.costs._asked_at -= 100  # PROBE_S later
        one.hits(A)  # no request waits for the measurement
        eventually(lambda: (one.tier.costs.ask_s or 1) < 0.2, "the measurement")


def test_many_who_wait(tmp_path: Path, store: Stuck, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefix_reader, "MAX_WAITING", 3)
    monkeypatch.setattr(cost_model, "FIRST_WAIT_S", 30.0)
    with node(tmp_path, store) as one:
        store.kind, store.hangs = "exists", asyncio.Event()
        answers = [one.cache.acquire_soon(chain_keys(("absent", i), 3), True, USE) for i in range(5)]
        eventually(lambda: sum(answer.done() for answer in answers) == 2, "those that are too many")
        one.tier._loop.call_soon_threadsafe(store.hangs.set)
        for answer in answers:
            one.cache.release(answer.result(30))
        eventually(lambda: one.tier.reader.num_waiting == 0)
        assert one.hits(A) == 6


# -- windows -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows of two chunks."""
    limit = 2 * GEOMETRY.slot_nbytes
    monkeypatch.setattr(tier_module, "WINDOW_NBYTES", (limit, limit))


@pytest.mark.usefixtures("small_windows")
def test_a_store_that_becomes_slow_on_the_way_gives_what_has_come(
    tmp_path: Path, store: Stuck, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cost_model, "LEAST_WAIT_S", 2.0)  # for a window
    with node(tmp_path, store, slots=64, timeout_s=300.0) as one:
        informed(one, six_chunks_s=60.0)  # 200 s for all chunks, 20 s for a window
        store.kind, store.first, store.hangs = "get", 2, asyncio.Event()
        hits, took_s = timed(lambda: one.hits(LONG))
        assert hits == 4
        assert took_s < SOON_S
        eventually(lambda: one.tier._calls.stalled, "the mark")
        assert one.cache.acquire_soon(A, True, USE).done()
        one.tier._loop.call_soon_threadsafe(store.hangs.set)
        eventually(lambda: not one.tier.reader.num_waiting, "the end of the request")
        assert one.counters["remote_late_chunks"] == 4  # two windows were under way
        assert one.cache.lookup(LONG) == 8


@pytest.mark.usefixtures("small_windows")
def test_a_window_is_waited_for_no_longer_than_computing_it_takes(
    tmp_path: Path, store: Stuck, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cost_model, "LEAST_WAIT_S", 300.0)
    with node(tmp_path, store, slots=64, timeout_s=300.0) as one:
        informed(one, six_chunks_s=6.0)  # 2 s for a window, 20 s for all chunks
        store.kind, store.first, store.hangs = "get", 1, asyncio.Event()
        hits, took_s = timed(lambda: one.hits(LONG))
        assert hits == 2
        assert took_s < SOON_S
        one.tier._loop.call_soon_threadsafe(store.hangs.set)


@pytest.mark.usefixtures("small_windows")
def test_a_store_that_is_just_fast_enough_is_waited_for_to_the_end(tmp_path: Path, store: Stuck) -> None:
    with node(tmp_path, store, slots=64) as one:
        informed(
            one, six_chunks_s=12.0, read_s=0.4
        )  # a window takes 4 s to compute and 0.4 s to read; the limit is 2.4 s
        store.kind, store.seconds = "get", 0.4
        hits, took_s = timed(lambda: one.hits(LONG))
        assert hits == 20
        assert took_s > 10 * 0.4  # longer than the limit of any one window


@pytest.mark.usefixtures("small_windows")
def test_the_first_read_waits_for_half_of_computing(tmp_path: Path, store: Stuck) -> None:
    with node(tmp_path, store, slots=64, timeout_s=300.0) as one:
        one.tier.outbox.chunk_tokens = SHAPE.chunk_tokens
        one.tier.note_prefill(20 * SHAPE.chunk_tokens / 1.6)
        store.kind, store.hangs = "get", asyncio.Event()
        answer = one.cache.acquire_soon(LONG, True, USE)
        began = time.monotonic()
        assert not answer.result(SOON_S).keys
        assert time.monotonic() - began < SOON_S
        one.tier._loop.call_soon_threadsafe(store.hangs.set)


@pytest.mark.usefixtures("small_windows")
def test_a_first_read_that_turns_out_not_to_pay_is_the_last(tmp_path: Path, store: Stuck) -> None:
    with node(tmp_path, store, slots=64) as one:
        one.tier.outbox.chunk_tokens = SHAPE.chunk_tokens
        one.tier.note_prefill(20 * SHAPE.chunk_tokens / 8.0)  # 0.8 s for a window
        store.kind, store.seconds = "get", 0.85
        one.hits(LONG)
        eventually(lambda: not one.tier.reader.num_waiting, "the end of the request")
        assert [what for what, _ in store.calls].count("get") <= 2  # those that were under way
        assert one.hits(C) == 0
        assert one.counters["remote_gated_chunks"] == 6


def test_who_waits_for_somebody_else_s_read_waits_no_longer(
    tmp_path: Path, store: Stuck, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cost_model, "LEAST_WAIT_S", 2.0)
    with node(tmp_path, store, slots=64, timeout_s=300.0) as one:
        informed(one)
        store.kind, store.hangs = "get", asyncio.Event()
        answers = [one.cache.acquire_soon(A, True, USE) for _ in range(3)]
        began = time.monotonic()
        for answer in answers:
            assert not answer.result(SOON_S).keys
            one.cache.release(answer.result())
        assert time.monotonic() - began < SOON_S
        assert len([what for what, _ in store.calls if what == "get"]) == 1
        one.tier._loop.call_soon_threadsafe(store.hangs.set)


# -- how many tokens a chunk has ---------------------------------------------------------------------------------------


def test_a_node_that_only_reads_learns_the_tokens_of_a_chunk(tmp_path: Path, store: Stuck) -> None:
    with node(tmp_path, store, slots=64) as one:
        told: list[int] = []
        real = one.tier.costs.chunks_worth_reading

        def chunks_worth_reading(chunks: int, chunk_tokens: int, client: int = 0) -> int:
            told.append(chunk_tokens)
            return real(chunks, chunk_tokens)

        one.tier.costs.chunks_worth_reading = chunks_worth_reading  # type: ignore[method-assign]
        eventually(lambda: one.hits(A) == 6)  # the first request waits for a second at most
        assert one.tier.outbox.chunk_tokens in (0, SHAPE.chunk_tokens)  # a hit in DRAM sets it
        one.tier.outbox.chunk_tokens = 0
        one.hits(B)
        assert told[0] == 0
        assert told[-1] == SHAPE.chunk_tokens
        assert dict(one.tier.reader._chunk_tokens) == {NAMESPACE: SHAPE.chunk_tokens}


def test_what_dram_has_of_a_prefix_tells_the_tokens_of_a_chunk(tmp_path: Path, store: Stuck) -> None:
    with nodes(tmp_path, store, slots=64) as (one, _):
        one.compute(A[:2])
        one.tier.outbox.chunk_tokens = 999  # of another namespace
        lease, _ = one.cache._acquire(A, True, USE)

        asked = WaitingRequest(list(A), USE, True, [lease])
        assert one.tier.reader.admits(asked)
        assert asked.chunk_tokens == SHAPE.chunk_tokens
        one.tier.reader.num_waiting -= 1
        one.cache.release(lease)
