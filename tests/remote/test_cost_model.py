"""When loads and writes are worth their cost, on a clock that the test moves, and how a store that has hung is used again."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from kvkern.metrics import CacheCounters
from kvkern.policy.grit import Grit
from kvkern.policy.persist_modes import Costs, Persist
from kvkern.remote.cost_model import (
    ASK_SHARE,
    ASK_TIMES,
    FIRST_READ_SHARE,
    FIRST_WAIT_S,
    LEAST_WAIT_S,
    LONGEST_ASK_S,
    LONGEST_WAIT_S,
    PROBE_CHUNKS,
    PROBE_S,
    READ_TIMES,
    CostModel,
)
from kvkern.remote.write_behind import WriteBehind
from kvkern.tiers.slot_records import SlotRecords
from tests.remote.conftest import Clock
from tests.support import chain_keys, make_arena

CHUNK_NBYTES, CHUNK_TOKENS = 32 << 20, 256  # of an 8 B model
FAST_S = CHUNK_NBYTES / 10e9


@pytest.fixture
def costs(clock: Clock) -> CostModel:
    made = CostModel(CHUNK_NBYTES, clock)
    made.note_prefill(15_000)
    return made


def test_what_is_not_known_refuses_nothing(clock: Clock) -> None:
    costs = CostModel(CHUNK_NBYTES, clock)
    assert costs.chunks_worth_reading(7, 0) == costs.chunks_worth_reading(7, CHUNK_TOKENS) == 7
    assert costs.ask_limit(7, CHUNK_TOKENS) == costs.read_limit(7, 7, CHUNK_TOKENS) == (FIRST_WAIT_S, FIRST_WAIT_S)
    assert costs.worth_asking(1, CHUNK_TOKENS)
    assert costs.write_threshold(CHUNK_TOKENS) == pytest.approx(Costs().threshold)


COMPUTE_S = CHUNK_TOKENS / 15_000  # seconds to compute a chunk


def test_what_was_never_measured_gets_a_share_of_computing(costs: CostModel) -> None:
    assert costs.ask_limit(4, CHUNK_TOKENS) == (ASK_SHARE * 4 * COMPUTE_S, LEAST_WAIT_S)
    assert costs.ask_limit(1000, CHUNK_TOKENS) == (FIRST_WAIT_S, FIRST_WAIT_S)
    assert costs.read_limit(4, 20, CHUNK_TOKENS).request_s == pytest.approx(FIRST_READ_SHARE * 20 * COMPUTE_S)
    assert costs.read_limit(4, 1000, CHUNK_TOKENS) == (FIRST_WAIT_S, FIRST_WAIT_S)


def test_a_question_may_take_some_times_what_it_takes(costs: CostModel, clock: Clock) -> None:
    costs.note_ask(0.001)
    assert costs.ask_limit(1000, CHUNK_TOKENS) == (LEAST_WAIT_S, LEAST_WAIT_S)
    assert costs.ask_limit(1, CHUNK_TOKENS) == (ASK_SHARE * COMPUTE_S, LEAST_WAIT_S)
    for _ in range(200):
        costs.note_ask(0.1)
    assert costs.ask_limit(1000, CHUNK_TOKENS).request_s == pytest.approx(ASK_TIMES * 0.1, rel=0.01)
    for _ in range(200):
        costs.note_ask(4.0)
    assert not costs.worth_asking(1000, CHUNK_TOKENS)  # asking takes four seconds, computing seventeen
    assert costs.ask_limit(10_000, CHUNK_TOKENS).request_s == LONGEST_ASK_S
    for _ in range(200):
        costs.note_ask(6.0)
    assert not costs.worth_asking(10_000, CHUNK_TOKENS)
    assert not costs.worth_asking(10_000, 0)  # the time to compute is not known
    clock.now += PROBE_S
    assert costs.worth_asking(1000, CHUNK_TOKENS)
    assert costs.ask_limit(1000, CHUNK_TOKENS).request_s == 0  # this question only measures: nobody waits for it
    costs.note_ask(0.001)
    assert costs.worth_asking(1000, CHUNK_TOKENS)


@pytest.mark.parametrize("share", [0.05, 0.2, 0.5, 0.89])
def test_a_window_may_take_some_times_what_it_takes_and_no_longer_than_computing(
    costs: CostModel, share: float
) -> None:
    read_s = share * COMPUTE_S
    costs.note_read(1, read_s)
    for chunks in (1, 3, 8, 50):
        wait = costs.read_limit(chunks, 1000, CHUNK_TOKENS)
        assert wait.stalled_after_s == pytest.approx(max(LEAST_WAIT_S, READ_TIMES * chunks * read_s))
        assert wait.request_s == pytest.approx(min(wait.stalled_after_s, chunks * COMPUTE_S))
        assert wait.request_s > chunks * read_s  # a read that is just fast enough is waited for
    assert costs.read_limit(1 << 20, 1 << 20, CHUNK_TOKENS) == (LONGEST_WAIT_S, LONGEST_WAIT_S)
    assert costs.read_limit(1 << 20, 1 << 20, 0) == (LONGEST_WAIT_S, LONGEST_WAIT_S)  # the time to compute is not known


def test_what_does_not_pay_is_not_waited_for(costs: CostModel, clock: Clock) -> None:
    costs.note_read(8, 8 * COMPUTE_S)
    clock.now += PROBE_S
    assert costs.chunks_worth_reading(8, CHUNK_TOKENS) == PROBE_CHUNKS
    assert costs.read_limit(PROBE_CHUNKS, 8, CHUNK_TOKENS).request_s == 0


def test_a_slow_store_is_left_and_tried_now_and_then(costs: CostModel, clock: Clock) -> None:
    costs.note_read(8, 8 * 0.1)
    assert costs.chunks_worth_reading(8, CHUNK_TOKENS) == 0
    clock.now += PROBE_S
    assert costs.chunks_worth_reading(8, CHUNK_TOKENS) == PROBE_CHUNKS
    assert costs.chunks_worth_reading(8, CHUNK_TOKENS) == 0  # the trial of another request is under way
    costs.note_read(PROBE_CHUNKS, PROBE_CHUNKS * 0.09)  # it is still too slow
    assert costs.chunks_worth_reading(8, CHUNK_TOKENS) == 0
    clock.now += PROBE_S
    assert costs.chunks_worth_reading(8, CHUNK_TOKENS) == PROBE_CHUNKS


def test_asking_that_takes_too_long_is_tried_by_one_request_now_and_then(costs: CostModel, clock: Clock) -> None:
    costs.note_ask(8 * COMPUTE_S)
    for _ in range(2):
        assert not costs.worth_asking(8, CHUNK_TOKENS)
        clock.now += PROBE_S
        assert costs.worth_asking(8, CHUNK_TOKENS)


@pytest.mark.parametrize("before", [0, 1, 1000])
def test_reads_that_hung_once_are_forgotten_by_the_first_try(costs: CostModel, clock: Clock, before: int) -> None:
    if before:
        costs.note_read(before, before * FAST_S)
    costs.note_read(50, 20.0)
    assert costs.chunks_worth_reading(8, CHUNK_TOKENS) == 0
    clock.now += PROBE_S
    costs.note_read(costs.chunks_worth_reading(8, CHUNK_TOKENS), PROBE_CHUNKS * FAST_S)
    assert costs.chunks_worth_reading(8, CHUNK_TOKENS) == 8


def test_one_slow_read_after_a_pause_does_not_count_more_than_others(costs: CostModel, clock: Clock) -> None:
    costs.note_read(1000, 1000 * FAST_S)
    clock.now += 100 * PROBE_S
    costs.note_read(1, 0.1)
    assert costs.chunks_worth_reading(8, CHUNK_TOKENS) == 8


def test_a_store_that_was_emptied_is_held_to_keep_things_again(costs: CostModel) -> None:
    costs.note_gone(10.0)
    assert costs.residency_s == 10.0
    for _ in range(100):
        costs.note_still_there(5.0)  # a shorter age changes nothing
    assert costs.residency_s == 10.0
    for _ in range(100):
        costs.note_still_there(600.0)
    assert 590 < costs.residency_s < 600


class Likely(Grit):
    """A policy whose chance for each chunk is its place in `of`."""

    of: dict[bytes, float]

    def chances(self, keys: Sequence[bytes], horizon_s: float) -> list[float]:
        return [self.of[key] for key in keys]


def test_writes_that_hung_once_are_tried_again(tmp_path: Path, costs: CostModel, clock: Clock) -> None:
    """Nothing else measures writes: without this, a threshold that no chunk reaches would stay for ever."""
    keys = chain_keys("a", 5)
    policy = Likely(8)
    policy.of = dict(zip(keys, (0.6, 0.01, 0.8, 0.7, 0.9), strict=True))
    arena = make_arena(tmp_path)
    outbox = WriteBehind(
        SlotRecords(arena), Persist.PREDICTED, 8, costs, CacheCounters(), lambda: True, lambda: None,
    )  # fmt: skip
    outbox.chunk_tokens = CHUNK_TOKENS
    assert outbox.choose(keys, policy) == [keys[i] for i in (0, 2, 3, 4)]
    costs.note_write(8, 8 * FAST_S)
    assert len(outbox.choose(keys, policy)) == 4
    costs.note_write(8, 8.0)
    assert outbox.choose(keys, policy) == []
    clock.now += PROBE_S
    probed = outbox.choose(keys, policy)
    assert sorted(probed) == sorted([keys[2], keys[4]])
    costs.note_write(len(probed), len(probed) * FAST_S)
    assert len(outbox.choose(keys, policy)) == 4
    arena.close()


def test_what_would_not_pay_anyway_is_no_try(tmp_path: Path, costs: CostModel, clock: Clock) -> None:
    keys = chain_keys("a", 3)
    policy = Likely(8)
    policy.of = dict.fromkeys(keys, 0.01)
    arena = make_arena(tmp_path)
    outbox = WriteBehind(
        SlotRecords(arena), Persist.PREDICTED, 8, costs, CacheCounters(), lambda: True, lambda: None,
    )  # fmt: skip
    outbox.chunk_tokens = CHUNK_TOKENS
    costs.note_write(8, 8.0)
    clock.now += PROBE_S
    assert outbox.choose(keys, policy) == []
    arena.close()


def test_a_clients_speed_counts_for_its_own_requests(clock: Clock) -> None:
    """One client said that it computes 10^9 tokens/s, and for all clients every remote read was worthless."""
    costs = CostModel(CHUNK_NBYTES, clock)
    costs.note_read(100, 100 * COMPUTE_S / 4)
    for client in (1, 2, 3):
        costs.note_prefill(15_000, client)
    for _ in range(100):
        costs.note_prefill(1e7, 4)
        costs.note_prefill(1e-6, 5)
    assert [costs.chunks_worth_reading(8, CHUNK_TOKENS, client) for client in (1, 2, 3, 6)] == [8] * 4
    assert costs.read_limit(8, 8, CHUNK_TOKENS, 4).request_s == 0
    honest = costs.read_limit(8, 8, CHUNK_TOKENS, 1)
    assert costs.read_limit(8, 8, CHUNK_TOKENS, 6) == honest  # it has told nothing: the median counts
    assert costs.prefill_tokens_s == 15_000
    for client in (1, 2, 3, 5):
        costs.forget_client(client)
    assert costs.prefill_tokens_s == pytest.approx(1e7)
    costs.forget_client(4)
    assert costs.prefill_tokens_s is None  # what is not known refuses nothing
    assert costs.chunks_worth_reading(8, CHUNK_TOKENS, 4) == 8
