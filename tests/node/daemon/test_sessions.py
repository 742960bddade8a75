"""Leases and granted slots of clients that connect, disconnect and are killed. The clock and the processes are fakes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from kvkern.arena.file import MAX_PROCESSES
from kvkern.arena.slots import SlotState
from kvkern.errors import ArenaError
from kvkern.node.daemon import sessions as sessions_module
from kvkern.node.daemon.sessions import LEASED_SHARE, MAX_LEASES, RESTART_PIN_S
from kvkern.tiers.base import Reservation
from tests.node.conftest import write_payload
from tests.node.daemon.world import EMPTY_MOST, ENGINE, MOST, OTHER, SLOTS, WORKER, World
from tests.support import NAMESPACE, chain_keys, key, make_arena


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    arena = make_arena(tmp_path, slots=SLOTS)
    yield World(arena)
    arena.close()


# -- requests ------------------------------------------------------------------------------------------------------------


def test_store_and_read(world: World) -> None:
    engine = world.engine()
    stored = world.put(engine, "a", 3)
    number, lease = world.sessions.acquire(engine, chain_keys("a", 5), prefix=True)
    assert lease.slots == stored.slots
    assert world.held() == {"leases": 1}
    world.sessions.release(engine, [number])
    assert world.held() == {}


def test_an_empty_lease_is_no_lease(world: World) -> None:
    number, lease = world.sessions.acquire(world.engine(), chain_keys("a", 5), prefix=True)
    assert (number, lease.slots, world.held()) == (0, (), {})


def test_leases_are_bounded(world: World) -> None:
    engine = world.engine()
    world.put(engine, "a", 1)
    chain = chain_keys("a", 1)
    numbers = [world.sessions.acquire(engine, chain, prefix=True)[0] for _ in range(MAX_LEASES + 2)]
    assert numbers[-2:] == [0, 0]
    assert len(set(numbers)) == MAX_LEASES + 1
    world.sessions.release(engine, numbers)
    assert world.held() == {}


def test_a_client_ends_its_own_leases_only_and_once(world: World) -> None:
    engine, other = world.engine(), world.engine(OTHER, "o")
    world.put(engine, "a", 1)
    number, _ = world.sessions.acquire(engine, chain_keys("a", 1), prefix=True)
    second, _ = world.sessions.acquire(other, chain_keys("a", 1), prefix=True)
    world.sessions.release(other, [number, number + 100, 0])
    world.sessions.release(engine, [number, number])
    assert world.held() == {"leases": 1}
    world.sessions.cache.drop(chain_keys("a", 1))
    assert world.free() == SLOTS - 1  # the other client still holds its lease
    world.sessions.release(other, [second])
    assert world.free() == SLOTS


@pytest.mark.parametrize("count", [0, 1, EMPTY_MOST, EMPTY_MOST + 1, 10 * SLOTS])
def test_a_grant_is_limited(world: World, count: int) -> None:
    engine = world.engine()
    assert len(world.sessions.grant(engine, count).slots) == min(count, EMPTY_MOST)
    assert world.sessions.limit(engine) == EMPTY_MOST  # a granted slot holds no chunk yet


@pytest.mark.parametrize("count", [0, 1, MOST, MOST + 1, 10 * SLOTS])
def test_a_grant_is_limited_more_where_slots_hold_chunks(world: World, count: int) -> None:
    engine = world.engine()
    world.fill(engine)
    assert len(world.sessions.grant(engine, count).slots) == min(count, MOST)


def test_who_holds_more_than_a_limit_that_shrank_is_told_once(world: World) -> None:
    idle, busy = world.engine(), world.engine(OTHER, "o")
    idle.told_limit = world.sessions.limit(idle)
    held = world.sessions.grant(idle, SLOTS)
    assert world.sessions.above_limit() == []
    world.fill(busy, SLOTS - len(held.slots))
    assert len(held.slots) > world.sessions.limit(idle)
    assert world.sessions.above_limit() == [idle]
    idle.told_limit = world.sessions.limit(idle)
    assert world.sessions.above_limit() == []  # its slots may be under way


def test_writers_share_the_limit(world: World) -> None:
    first, second = world.engine(), world.engine(OTHER, "o")
    world.worker()
    world.fill(first)
    assert [world.sessions.limit(session) for session in (first, second)] == [MOST // 2, MOST // 2]
    assert len(world.sessions.grant(first, SLOTS).slots) == MOST // 2
    assert world.sessions.grant(first, SLOTS).slots == ()
    assert len(world.sessions.grant(second, SLOTS).slots) == MOST // 2


def test_a_later_writer_gets_its_share_whatever_the_earlier_ones_hold(world: World) -> None:
    """The earlier writers are told of their new limit and give back the rest."""
    first = world.engine()
    world.fill(first)
    granted = world.sessions.grant(first, SLOTS)
    second = world.engine(OTHER, "o")
    assert len(world.sessions.grant(second, SLOTS).slots) == MOST // 2
    assert world.sessions.grant(first, SLOTS).slots == ()
    world.sessions.give_back(first, granted.slots[world.sessions.limit(first) :])
    assert world.held() == {"granted_slots": MOST}


def test_who_only_copies_is_granted_nothing(world: World) -> None:
    assert world.sessions.grant(world.worker(), 1).slots == ()


def test_foreign_and_stale_slots_publish_nothing(world: World) -> None:
    engine, other = world.engine(), world.engine(OTHER, "o")
    held = world.begin(engine, chain_keys("a", 1))
    write_payload(world.arena, held)
    assert world.publish(other, held) == [False]
    stale = Reservation(held.keys, held.slots, (held.generations[0] - 1,))
    assert world.publish(engine, stale) == [False]
    nowhere = Reservation(held.keys, (SLOTS + 7,), held.generations)
    assert world.publish(engine, nowhere) == [False]
    assert world.held() == {"granted_slots": 1}
    assert world.publish(engine, held) == [True]
    assert world.publish(engine, held) == [False]
    assert world.sessions.cache.lookup(held.keys) == 1


def test_one_publish_with_good_and_bad_rows(world: World) -> None:
    engine = world.engine()
    held = world.begin(engine, chain_keys("a", 2))
    write_payload(world.arena, Reservation(held.keys[:1], held.slots[:1], held.generations[:1]))
    slots, generations = (held.slots[0], *held.slots, 99), (held.generations[0], *held.generations, 1)
    keys = (key("x"), *held.keys, key("y"))
    assert world.sessions.publish(engine, NAMESPACE, slots, generations, keys, ()) == [False] * 4
    assert world.held() == {}  # the first row used up its slot, because it names another key than the header
    assert world.free() == SLOTS


def test_giving_back_is_for_ones_own_slots(world: World) -> None:
    engine, other = world.engine(), world.engine(OTHER, "o")
    granted = world.sessions.grant(engine, 2)
    world.sessions.give_back(other, granted.slots)
    assert world.free() == SLOTS - 2
    world.sessions.give_back(engine, [*granted.slots, *granted.slots, 1000])
    assert (world.free(), world.held()) == (SLOTS, {})


# -- processes that vanish -------------------------------------------------------------------------------------------------


def test_a_killed_client_leaves_nothing(world: World) -> None:
    engine = world.engine()
    world.put(engine, "a")
    world.sessions.acquire(engine, chain_keys("a", 2), prefix=True)
    world.begin(engine, chain_keys("b", 2))
    world.kill(ENGINE)
    assert world.held() == {}
    assert world.free() == SLOTS - MOST
    assert world.recorded() == set()


def test_a_lost_connection_keeps_what_the_process_held(world: World) -> None:
    engine = world.engine()
    world.put(engine, "a", 1)
    world.sessions.acquire(engine, chain_keys("a", 1), prefix=True)
    held = world.begin(engine, chain_keys("b", 2))
    world.sessions.detach(engine)
    assert world.held() == {"quarantined_leases": 1, "quarantined_slots": 2}
    assert world.recorded() == {ENGINE}
    world.now += 10 * RESTART_PIN_S
    world.sessions.sweep()
    world.sessions.cache.drop(chain_keys("a", 1))
    assert world.free() == SLOTS - 3
    again = world.engine()
    assert world.publish(again, held) == [False] * 2  # granted to a session that is gone
    world.sessions.settle(again)
    assert (world.held(), world.free()) == ({}, SLOTS)


def test_slots_stay_with_the_worker_of_a_killed_engine(world: World) -> None:
    engine = world.engine()
    world.worker()
    world.begin(engine, chain_keys("a", 2))
    world.kill(ENGINE)
    assert world.held() == {"quarantined_slots": 2}
    world.kill(WORKER)
    assert (world.held(), world.free()) == ({}, SLOTS)


def test_also_when_the_worker_was_disconnected_before(world: World) -> None:
    engine, worker = world.engine(), world.worker()
    world.begin(engine, chain_keys("a", 2))
    world.sessions.detach(worker)
    world.kill(ENGINE)
    assert world.held() == {"quarantined_slots": 2}
    assert world.recorded() == {WORKER}
    world.dead.add(WORKER)
    world.sessions.sweep()
    assert (world.held(), world.free()) == ({}, SLOTS)


def test_a_new_engine_of_the_same_name_does_not_speak_for_the_old_worker(world: World) -> None:
    engine = world.engine()
    world.worker()
    world.begin(engine, chain_keys("a", 2))
    world.kill(ENGINE)
    world.sessions.settle(world.engine((102, 1)))
    world.worker()  # the old worker connects again
    assert world.held() == {"quarantined_slots": 2}


def test_an_engine_settles_for_its_worker(world: World) -> None:
    engine = world.engine()
    world.worker()
    world.begin(engine, chain_keys("a", 2))
    world.sessions.detach(engine)
    world.sessions.settle(world.engine())
    assert world.held() == {}


def test_engines_do_not_settle_for_others(world: World) -> None:
    engine = world.engine()
    world.begin(engine, chain_keys("a", 2))
    world.sessions.detach(engine)
    world.sessions.settle(world.engine(OTHER, "o"))
    world.sessions.settle(world.engine(ENGINE, "another engine in the same process"))
    assert world.held() == {"quarantined_slots": 2}


def test_an_end_seen_after_the_engine_has_settled(world: World) -> None:
    """The daemon may see the end of the old connection after the first messages on the new one."""
    old = world.engine()
    world.put(old, "a", 1)
    world.sessions.acquire(old, chain_keys("a", 1), prefix=True)
    world.begin(old, chain_keys("b", 1))
    new = world.engine()
    world.sessions.settle(new)
    world.sessions.detach(old)
    assert world.held() == {}
    assert world.free() == SLOTS - 1


def test_but_not_before_it_has_settled(world: World) -> None:
    old = world.engine()
    world.begin(old, chain_keys("b", 1))
    new = world.engine()
    world.sessions.detach(old)
    assert world.held() == {"quarantined_slots": 1}
    world.sessions.settle(new)
    assert world.held() == {}


def test_engines_without_a_name_are_each_on_their_own(world: World) -> None:
    first, second = world.engine(name=""), world.engine(OTHER, "")
    world.begin(first, chain_keys("a", 1))
    world.sessions.detach(first)
    world.sessions.settle(second)
    assert world.held() == {"quarantined_slots": 1}
    world.sessions.settle(world.engine(name=""))
    assert world.held() == {}


def test_a_detach_twice_frees_once(world: World) -> None:
    engine = world.engine()
    world.put(engine, "a", 1)
    world.sessions.acquire(engine, chain_keys("a", 1), prefix=True)
    world.kill(ENGINE)
    world.sessions.detach(engine)
    assert world.sessions.cache.drop(chain_keys("a", 1)) == 1
    assert world.free() == SLOTS


def test_too_many_processes_are_refused(world: World) -> None:
    for number in range(MAX_PROCESSES):
        world.engine((1000 + number, 1), f"e{number}")
    world.engine((1000, 1), "again")
    with pytest.raises(ArenaError, match="128 processes"):
        world.engine((9999, 1), "late")
    world.kill((1001, 1))
    world.engine((9999, 1), "late")
    assert (9999, 1) in world.recorded()


def test_a_user_gets_half_of_the_places(world: World) -> None:
    """Root and the daemon's own user get the rest."""
    for number in range(MAX_PROCESSES // 2):
        world.engine((1000 + number, 1), f"e{number}", uid=7001)
    with pytest.raises(
        ArenaError, match="64 processes of uid 7001 use this cache already, the limit of a user; end some"
    ):
        world.engine((9999, 1), "late", uid=7001)
    world.engine((1000, 1), "again", uid=7001)
    world.engine((9999, 1), "late")
    world.kill((1001, 1))
    world.engine((9998, 1), "later", uid=7001)


def test_a_users_leases_are_bounded(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """In sum, also of what it has left in quarantine."""
    monkeypatch.setattr(sessions_module, "MAX_KEYS", 0)
    engine, chain = world.engine(uid=7001), chain_keys("a", 4)
    world.put(engine, "a", 4)
    numbers = [world.sessions.acquire(engine, chain, prefix=True)[0] for _ in range(LEASED_SHARE * SLOTS // 4 + 1)]
    assert numbers.index(0) == LEASED_SHARE * SLOTS // 4
    world.sessions.detach(engine)
    other = world.engine(OTHER, "o", uid=7001)
    assert world.sessions.acquire(other, chain, prefix=True)[0] == 0
    assert world.sessions.acquire(world.engine((300, 1), "x"), chain, prefix=True)[0]
    world.dead.add(ENGINE)
    world.sessions.sweep()
    number, _ = world.sessions.acquire(other, chain, prefix=True)
    assert number
    world.sessions.release(other, [number])
    assert world.sessions._leased[7001] == 0


def test_a_chunk_that_is_asked_for_many_times(world: World) -> None:
    engine = world.engine()
    world.put(engine, "a", 1)
    assert world.sessions.acquire(engine, chain_keys("a", 1) * (SLOTS + 1), prefix=True)[0] == 0
    assert world.held() == {}


def test_processes_in_quarantine_count(world: World) -> None:
    first = world.engine()
    world.begin(first, chain_keys("a", 1))
    world.sessions.detach(first)
    for number in range(MAX_PROCESSES - 1):
        world.engine((1000 + number, 1), f"e{number}")
    with pytest.raises(ArenaError, match="128 processes"):
        world.engine(OTHER, "o")
    assert ENGINE in world.recorded()
    world.engine()  # its process already has a row


def test_a_process_keeps_its_row(world: World) -> None:
    """The daemon may be killed between two rows."""
    world.engine((300, 1), "x")
    world.engine((200, 1), "y")
    rows = world.arena.processes.tolist()
    world.engine((100, 1), "z")
    assert world.arena.processes.tolist()[:2] == rows[:2]
    world.kill((300, 1))
    world.sessions.sweep()
    assert world.arena.processes.tolist()[:3] == [(0, 0), *rows[1:2], (100, 1)]


# -- daemons that vanish ---------------------------------------------------------------------------------------------------


def test_chunks_outlive_the_daemon(world: World) -> None:
    engine = world.engine()
    stored = world.put(engine, "a")
    world.kill(ENGINE)
    assert world.restart() == (MOST, 0)
    assert world.held() == {}
    _, lease = world.sessions.acquire(world.engine(), chain_keys("a", MOST), prefix=True)
    assert lease.slots == stored.slots


def test_torn_chunks_are_counted_and_freed(world: World) -> None:
    stored = world.put(world.engine(), "a")
    world.arena.parts(0)[stored.slots[1], 0] ^= 1
    assert world.restart() == (MOST - 1, 1)


def test_nothing_is_evicted_under_survivors(world: World) -> None:
    engine = world.engine()
    for name in range(SLOTS // MOST):
        world.put(engine, name)
    assert world.restart() == (SLOTS, 0)
    assert world.held() == {"quarantined_leases": 1}
    other = world.engine(OTHER, "o")
    world.sessions.settle(other)
    assert world.sessions.grant(other, 1).slots == ()
    world.now += RESTART_PIN_S
    world.sessions.sweep()
    assert world.held() == {}
    assert len(world.sessions.grant(other, 1).slots) == 1


def test_pins_of_a_restart_are_no_lookups(world: World) -> None:
    world.put(world.engine(), "a")
    world.restart()
    usage = world.sessions.usage()
    assert (usage["lookup_chunks"], usage["hit_chunks"]) == (0, 0)


@pytest.mark.parametrize("ending", ["killed", "settles"])
def test_survivors_keep_what_they_were_writing(world: World, ending: str) -> None:
    held = world.begin(world.engine(), chain_keys("a", 2))
    world.sessions.grant(world.engine(OTHER, "o"), 1)
    world.restart()
    assert world.held() == {"quarantined_slots": 3}
    world.now += 10 * RESTART_PIN_S
    world.sessions.sweep()
    world.kill(OTHER)
    world.sessions.sweep()
    assert world.held() == {"quarantined_slots": 3}
    write_payload(world.arena, held)
    assert world.publish(world.engine(), held) == [False] * 2
    if ending == "killed":
        world.kill(ENGINE)
        world.sessions.sweep()
    else:
        world.sessions.settle(world.engine())
    assert (world.held(), world.free()) == ({}, SLOTS)


def test_a_worker_keeps_what_its_engine_was_granted_before_both_died(world: World) -> None:
    """Engine and daemon are killed; the worker still copies into slots whose owner is gone."""
    engine = world.engine()
    world.worker()
    world.begin(engine, chain_keys("a", 2))
    world.dead.add(ENGINE)
    world.restart()
    assert world.held() == {"quarantined_slots": 2}
    world.sessions.settle(world.engine((102, 1)))
    world.worker()
    assert world.held() == {"quarantined_slots": 2}
    world.kill(WORKER)
    assert (world.held(), world.free()) == ({}, SLOTS)


def test_a_worker_that_connects_late_is_settled_too(world: World) -> None:
    engine = world.engine()
    world.worker()
    world.put(engine, "a")
    world.begin(engine, chain_keys("b", 2))
    world.restart()
    world.sessions.settle(world.engine())
    assert world.held() == {"quarantined_leases": 1, "quarantined_slots": 2}  # kept for the worker
    world.worker()
    world.sessions.sweep()
    assert world.held() == {}


def test_what_was_cleared_under_a_reader_is_neither_served_nor_given_away(world: World) -> None:
    engine = world.engine()
    stored = world.put(engine, "a", 2)
    world.sessions.acquire(engine, chain_keys("a", 2), prefix=True)
    world.sessions.cache.clear(NAMESPACE)
    assert world.restart() == (0, 0)
    assert world.held() == {"quarantined_slots": 2}
    assert set(world.arena.headers["state"][list(stored.slots)].tolist()) == {SlotState.WRITING}
    world.now += RESTART_PIN_S
    world.sessions.sweep()
    assert (world.held(), world.free()) == ({}, SLOTS)


def test_daemons_killed_one_after_the_other(world: World) -> None:
    """No client has connected to the second daemon when it dies."""
    engine = world.engine()
    world.worker()
    world.put(engine, "a")
    world.begin(engine, chain_keys("b", 2))
    for _ in range(3):
        assert world.restart() == (MOST, 0)
        assert world.recorded() == {ENGINE, WORKER}
        assert world.held() == {"quarantined_leases": 1, "quarantined_slots": 2}
    world.dead |= {ENGINE, WORKER}
    world.restart()
    assert (world.held(), world.recorded()) == ({}, set())
