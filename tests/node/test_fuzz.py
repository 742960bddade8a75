"""Wrong frames against a real daemon: it does not end or grow, and it serves good clients before, meanwhile and after."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from kvkern.node import protocol as p
from tests.node.conftest import ROOT, Daemon, MakeClient, eventually, read_verified, stock, write_payload
from tests.node.fuzzer import LARGE_NBYTES
from tests.support import SHAPE, chain_keys

ROUNDS = int(os.environ.get("KVKERN_SOAK_FUZZ_ROUNDS", "400"))  # of each process; some six frames each
PROCESSES = 3


def resident_nbytes(pid: int) -> int:
    """Return the resident memory that is the process's own: shared pages, those of the arena, do not count."""
    fields = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in fields if line.startswith("RssAnon"))


def descriptors(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def fuzz(daemon: Daemon, first_seed: int) -> None:
    """Run several fuzzers at once. Returns when they have ended."""
    command = [sys.executable, "-m", "tests.node.fuzzer", str(daemon.socket)]
    fuzzers = [
        subprocess.Popen([*command, str(first_seed + number), str(ROUNDS)], cwd=ROOT) for number in range(PROCESSES)
    ]
    assert [process.wait(300 + ROUNDS) for process in fuzzers] == [0] * PROCESSES
    assert daemon.alive


def test_a_daemon_under_wrong_frames(daemon: Daemon, make_client: MakeClient) -> None:
    client = make_client("good")
    chains = [chain_keys(number, 5) for number in range(6)]
    for seed, chain in enumerate(chains):
        reservation = client.reserve(chain, chain, SHAPE)
        write_payload(client.arena, reservation, seed)
        assert client.commit(reservation) == 5
    held = client.acquire(chains[0])
    begun = client.reserve(chain_keys("begun", 2), chain_keys("begun", 2), SHAPE)
    eventually(lambda: stock(client)[0] > 0)

    def still() -> dict[str, object]:
        """Return the daemon's counters while nothing is in quarantine, which is all the good client's; else empty."""
        names = ("chunks", "sessions", "connections", "leases", "unwritten_slots")
        found = daemon.stat()
        found["unwritten_slots"] = (
            found["granted_slots"] + found["free_slots"]
        )  # writers that come and go change its share
        return {name: found[name] for name in names if not found["quarantined_leases"] + found["quarantined_slots"]}

    before = still()
    assert before
    fuzz(daemon, first_seed=0)  # first fill the allocator's pools
    eventually(lambda: still() == before, "what was before")
    open_before, memory_before = descriptors(daemon.pid), resident_nbytes(daemon.pid)
    for number in range(2):
        fuzz(daemon, first_seed=100 * (number + 1))
    eventually(lambda: still() == before, "what was before")
    assert client.connected
    assert daemon.stat()["bad_frames"] > ROUNDS
    eventually(lambda: descriptors(daemon.pid) <= open_before, "as few open files as before")
    # If the daemon kept incomplete frames, it would hold some 200 of LARGE_NBYTES by now.
    assert resident_nbytes(daemon.pid) < memory_before + 20 * LARGE_NBYTES
    assert "Traceback" not in daemon.log

    write_payload(client.arena, begun)
    assert client.commit(begun) == 2
    assert read_verified(client.arena, held, seed=0)
    client.release(held)
    other = make_client("next")
    for seed, chain in enumerate(chains):
        lease = other.acquire(chain)
        assert (lease.keys, read_verified(other.arena, lease, seed)) == (tuple(chain), True)
        other.release(lease)
    assert daemon.ask(p.Clear(1, None)) == [{"chunks": 32}]
