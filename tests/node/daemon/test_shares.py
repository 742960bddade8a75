"""Grant floods: whatever connections a user opens and closes, most chunks stay, and other writers get their slots.

Also what a restarted daemon believes of the list of processes, which every client can write.
"""

from __future__ import annotations

import os
import subprocess
from contextlib import ExitStack

import pytest

from kvkern.arena.file import Arena
from kvkern.arena.process_identity import process_start
from kvkern.arena.slots import SlotState
from kvkern.node import protocol as p
from kvkern.node.daemon.arena_holders import maps_arena
from kvkern.node.daemon.sessions import RESTART_PIN_S
from kvkern.node.daemon.shares import MOST_SHARES, Process
from tests.node.conftest import Daemon, MakeClient, Peer, eventually, store
from tests.node.daemon.world import EMPTY_MOST, ENGINE, MOST, OTHER, SLOTS, WORKER, World
from tests.support import chain_keys

USER, ANOTHER = 1000, 1001


@pytest.fixture
def world(arena: Arena) -> World:
    return World(arena)


@pytest.fixture
def full(world: World) -> World:
    """A cache in which every slot holds a chunk, and nobody is connected."""
    engine = world.engine()
    for name in range(SLOTS // MOST):
        world.put(engine, name)
    world.sessions.detach(engine)
    assert len(world.sessions.cache.all_keys()) == SLOTS
    return world


def flood(world: World, process: Process, uid: int, rounds: int = 21) -> int:
    """Connect, ask for everything, hang up, and again. Returns the slots that were granted. The process lives on."""
    granted = 0
    for _ in range(rounds):
        session = world.engine(process, "flood", uid)
        granted += len(world.sessions.grant(session, 1 << 16).slots)
        world.sessions.detach(session)
    return granted


# -- floods --------------------------------------------------------------------------------------------------------


def test_a_process_that_hangs_up_again_and_again_gets_one_share(full: World) -> None:
    """It emptied the whole cache in a few rounds, because its limit ignored what it had in quarantine."""
    assert flood(full, OTHER, USER) == MOST
    assert len(full.sessions.cache.all_keys()) == SLOTS - MOST
    assert full.held() == {"quarantined_slots": MOST}
    full.kill(OTHER)
    full.sessions.sweep()
    assert full.held() == {}


def test_many_processes_of_a_user_get_two_shares(full: World) -> None:
    for number in range(40):
        flood(full, (300 + number, 1), USER, rounds=2)
    assert len(full.sessions.cache.all_keys()) == SLOTS - MOST_SHARES * MOST


def test_polite_connections_get_two_shares_at_most(full: World) -> None:
    """Each took its share of what was left to it, and kept it: 40 of them held 52 of 127 slots."""
    sessions = [full.engine((300 + number, 1), f"e{number}", USER) for number in range(40)]
    for session in sessions:
        full.sessions.grant(session, 1 << 16)
    for session in sessions:
        full.sessions.grant(session, 1 << 16)
    assert sum(len(session.granted) for session in sessions) <= MOST_SHARES * MOST
    assert len(full.sessions.cache.all_keys()) >= SLOTS - MOST_SHARES * MOST


def test_another_user_keeps_its_share(full: World) -> None:
    for number in range(40):
        flood(full, (300 + number, 1), USER, rounds=2)
    held = [full.engine((400 + number, 1), f"e{number}", USER) for number in range(40)]
    for session in held:
        full.sessions.grant(session, 1 << 16)
    honest = full.engine(ENGINE, "honest", ANOTHER)
    assert full.sessions.limit(honest) == MOST // 2
    assert len(full.sessions.grant(honest, SLOTS).slots) == MOST // 2


def test_an_engine_that_was_killed_and_starts_again_gets_its_share(full: World) -> None:
    """Its worker hangs, so what it was granted stays in quarantine. That is the first share; the new engine gets the second."""
    engine = full.engine(ENGINE, "e", USER)
    full.worker(WORKER, "e", USER)
    assert len(full.sessions.grant(engine, SLOTS).slots) == MOST
    full.kill(ENGINE)
    assert full.held() == {"quarantined_slots": MOST}
    assert len(full.sessions.grant(full.engine(OTHER, "e", USER), SLOTS).slots) == MOST


def test_free_slots_are_granted_first(world: World) -> None:
    """Nothing is evicted while there are free slots, whoever asks."""
    world.fill(world.engine(), SLOTS // 2)
    assert len(world.sessions.grant(world.engine(OTHER, "o", USER), SLOTS).slots) == SLOTS // 8
    assert len(world.sessions.cache.all_keys()) == SLOTS // 2


def test_a_hoarder_does_not_keep_others_from_storing(world: World) -> None:
    """It was granted half of an empty cache and gives nothing back. Slots that were free do not count as evicted ones."""
    hoarder = world.engine(OTHER, "o")
    assert len(world.sessions.grant(hoarder, SLOTS).slots) == EMPTY_MOST
    honest = world.engine()
    world.fill(honest, 2 * SLOTS)
    assert len(world.sessions.cache.all_keys()) == SLOTS - EMPTY_MOST


def test_engines_of_two_users_do_not_share_a_name(world: World) -> None:
    """Another user's engine of the same name ends no quarantine, and prolongs none."""
    victim, forger = world.engine(ENGINE, "e", USER), world.engine(OTHER, "e", ANOTHER)
    world.begin(victim, chain_keys("a", 2))
    world.sessions.detach(victim)
    world.sessions.settle(forger)
    assert world.held() == {"quarantined_slots": 2}
    world.kill(ENGINE)
    world.sessions.sweep()
    assert world.held() == {}


def take_what_it_gets(peer: Peer) -> None:
    """Ask for all slots. Returns when some have been granted, or none."""
    peer.greet(index=True)
    peer.say(p.Grant(1, p.MAX_SLOTS))
    while not isinstance(peer.hear(), p.Granted):
        continue


def test_a_flood_at_a_real_daemon(daemon: Daemon, make_client: MakeClient) -> None:
    client = make_client("honest")
    for name in range(12):
        assert store(client, chain_keys(name, 10)) == 10
    before = daemon.stat()["chunks"]
    for _ in range(21):
        with Peer(daemon.socket) as peer:
            take_what_it_gets(peer)
    row = daemon.stat()
    assert row["chunks"] >= before - 2 * row["slots"] // 8


def test_many_connections_at_a_real_daemon(daemon: Daemon, make_client: MakeClient) -> None:
    client = make_client("honest")
    for name in range(13):
        store(client, chain_keys(name, 10))
    before = daemon.stat()["chunks"]
    with ExitStack() as stack:
        for _ in range(40):
            take_what_it_gets(stack.enter_context(Peer(daemon.socket)))
        row = daemon.stat()
        assert row["chunks"] >= before - 2 * row["slots"] // 8
        assert row["granted_slots"] <= 2 * row["slots"] // 8 + (row["slots"] - before) // 2


# -- after a restart ------------------------------------------------------------------------------------------------


def name_as_owner(arena: Arena, process: Process) -> None:
    """Write into shared memory that this process holds every slot, as a client can."""
    arena.processes[:] = (0, 0)
    arena.processes[-1] = process
    headers = arena.headers
    headers["state"], headers["written"] = SlotState.WRITING, 0
    headers["owner_pid"], headers["owner_start"] = process


def test_owners_have_the_arena_mapped(full: World) -> None:
    """A process that lives for ever, such as pid 1, was named as the owner of all slots: they stayed in quarantine for ever."""
    name_as_owner(full.arena, OTHER)
    full.maps[OTHER[0]] = False
    full.restart()
    assert (full.held(), full.free()) == ({}, SLOTS)


def test_owners_that_cannot_be_seen_have_a_deadline(full: World) -> None:
    name_as_owner(full.arena, OTHER)
    full.maps[OTHER[0]] = None
    full.restart()
    assert full.held() == {"quarantined_slots": SLOTS}
    full.now += RESTART_PIN_S
    full.sessions.sweep()
    assert (full.held(), full.free()) == ({}, SLOTS)


def test_owners_that_map_the_arena_keep_as_much_as_clients_may_be_granted(full: World) -> None:
    name_as_owner(full.arena, OTHER)
    full.restart()
    assert full.held() == {"quarantined_slots": SLOTS}
    full.now += RESTART_PIN_S
    full.sessions.sweep()
    assert (full.held(), full.free()) == ({"quarantined_slots": MOST}, SLOTS - MOST)
    full.kill(OTHER)
    full.sessions.sweep()
    assert (full.held(), full.free()) == ({}, SLOTS)


def test_who_maps_an_arena(arena: Arena) -> None:
    assert maps_arena(arena, os.getpid()) is True
    with subprocess.Popen(["sleep", "60"]) as other:
        assert maps_arena(arena, other.pid) is False
        other.kill()
    assert maps_arena(arena, 1 << 22) is False  # above the largest pid


def test_a_process_that_this_user_may_not_examine(arena: Arena) -> None:
    if os.getuid() != 0:
        pytest.skip("needs root, to become another user in a child process")
    child = os.fork()
    if child == 0:
        os.setgid(65534)
        os.setuid(65534)
        os._exit(7 if maps_arena(arena, os.getppid()) is None else 8)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


def test_a_stranger_as_the_owner_at_a_real_daemon(daemon: Daemon, make_client: MakeClient) -> None:
    """A process that lives on and has nothing to do with the cache. Pid 1 is one, but not everybody may examine pid 1."""
    client = make_client("e")
    assert store(client, chain_keys("a", 4)) == 4
    stranger = subprocess.Popen(["sleep", "600"])
    try:
        daemon.kill()
        name_as_owner(client.arena, (stranger.pid, process_start(stranger.pid)))
        client.close()
        daemon.start()
        eventually(lambda: daemon.stat()["quarantined_slots"] == 0, "no slot is kept for it", RESTART_PIN_S / 2)
        again = make_client("f")
        assert store(again, chain_keys("b", 4)) == 4
    finally:
        stranger.kill()
        stranger.wait()
