"""What hostile clients do to a daemon. Each function is one kind: `kind(socket, rng, until, count)` does it until that time.

It calls `count` whenever it has got through with what it does.

    silent         connect as often as possible and say nothing
    half_frames    announce frames of 4 MiB and send all but their last byte
    grant_flood    ask for all slots, hang up, and again
    unread         send thousands of requests and never read an answer
    noise          the fuzzer's frames
    storm          connect, say Hello under odd process names, hang up at once
    scribbler      change bytes in the arena: headers, payload, the list of processes; copy or reseal slots
    scanner        store bytes that nobody will ask for, as fast as the daemon lets it
    operator       send what only an operator may: clear, evict, record; and settle under an honest engine's name

The daemon may refuse or hang up at any point. That is no fault.
"""

from __future__ import annotations

import ctypes
import random
import socket
import struct
import time
from collections.abc import Callable
from contextlib import ExitStack, closing, suppress
from pathlib import Path

import numpy as np

from kvkern.arena.file import Arena
from kvkern.arena.slots import SlotGeometry
from kvkern.errors import KvkernError
from kvkern.node import framing
from kvkern.node import protocol as p
from kvkern.node.client.cache_client import NodeClient
from kvkern.tiers.base import Reservation
from tests.node import fuzzer
from tests.node.conftest import Peer, write_payload
from tests.small_cache import BLOCK_TOKENS, PER_CHUNK
from tests.support import SHAPE

PLANES = 4  # K and V of the two layers of the small cache
GEOMETRY = SlotGeometry(PLANES * PER_CHUNK * BLOCK_TOKENS * 2 * 16 * 2, PLANES, 1)  # that of the honest engines
SIZES = p.Geometry.from_slots(GEOMETRY)
CONNECTIONS = 40  # of each kind at a time
_PR_SET_NAME = 15

Count = Callable[[], None]
Kind = Callable[[Path, random.Random, float, Count], None]


def _connected(path: Path, sent: bytes) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    sock.settimeout(2)
    try:
        sock.connect(str(path))
        with suppress(TimeoutError):  # the daemon reads no more
            sock.sendall(sent)
    except OSError:
        sock.close()
        raise
    return sock


def _hold(path: Path, sent: bytes, connections: int, until: float, count: Count) -> None:
    """Keep some connections open for some seconds after `sent`, again and again."""
    while time.time() < until:
        with ExitStack() as held:
            for _ in range(connections):
                with suppress(OSError):
                    held.enter_context(_connected(path, sent))
                    count()
            time.sleep(max(0.0, min(2.0, until - time.time())))


def silent(path: Path, rng: random.Random, until: float, count: Count) -> None:
    _hold(path, b"", 512, until, count)


def half_frames(path: Path, rng: random.Random, until: float, count: Count) -> None:
    hello = framing.encode(p.Hello(p.VERSION, "half", SIZES))
    half = struct.pack("<I", framing.MAX_FRAME_NBYTES) + bytes(framing.MAX_FRAME_NBYTES - 1)
    while time.time() < until:
        _hold(path, rng.choice([b"", hello]) + half, CONNECTIONS, min(until, time.time() + 3), count)


def grant_flood(path: Path, rng: random.Random, until: float, count: Count) -> None:
    while time.time() < until:
        with suppress(OSError, EOFError, KvkernError), Peer(path) as peer:
            peer.greet(GEOMETRY, engine=f"flood-{rng.randrange(4)}")
            peer.say(p.Grant(1, p.MAX_SLOTS))
            while not isinstance(peer.hear(), p.Granted):
                continue
            count()


def unread(path: Path, rng: random.Random, until: float, count: Count) -> None:
    hello = framing.encode(p.Hello(p.VERSION, "unread", SIZES))
    asked = [
        framing.encode(p.Acquire(1, rng.randbytes(32 * 200), False)),
        framing.encode(p.Grant(1, 1)),
        framing.encode(p.Stat(1)),
    ]
    while time.time() < until:
        sent = hello + b"".join(rng.choice(asked) * 50 for _ in range(60))
        _hold(path, sent, CONNECTIONS, min(until, time.time() + 3), count)


def noise(path: Path, rng: random.Random, until: float, count: Count) -> None:
    fuzzer.GEOMETRY = SIZES
    while time.time() < until:
        with suppress(OSError):
            fuzzer.speak(path, rng)
            count()


def storm(path: Path, rng: random.Random, until: float, count: Count) -> None:
    names = [b"1" + "é".encode() * 7 + b"\xc3", b"\xff\xfe) R 1 (", b"kvkern", b"a\n1"]
    while time.time() < until:
        ctypes.CDLL(None).prctl(_PR_SET_NAME, rng.choice(names), 0, 0, 0)
        with suppress(OSError):
            _connected(path, framing.encode(p.Hello(p.VERSION, "storm", SIZES, index=True))).close()
            count()


def _client(path: Path, engine: str, until: float) -> NodeClient | None:
    while time.time() < until:
        with suppress(KvkernError, OSError):
            return NodeClient.open(path, engine, GEOMETRY, timeout_s=10, prefault=False)
        time.sleep(0.2)
    return None


def _scribble(arena: Arena, rng: random.Random) -> None:
    slot, other = rng.randrange(arena.spec.num_slots), rng.randrange(arena.spec.num_slots)
    heads, parts = arena.heads, arena.parts(0)
    what = rng.randrange(6)
    if what == 0:
        parts[slot, rng.randrange(GEOMETRY.part_nbytes)] ^= 1 << rng.randrange(8)
    elif what == 1:  # one bit of the header's fixed fields
        raw = np.frombuffer(heads[slot].tobytes(), np.uint8).copy()
        raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
        heads[slot] = np.void(raw.tobytes())
    elif what == 2:  # one bit of a generation, up to the highest
        arena.headers["generation"][slot] ^= np.uint64(1) << np.uint64(rng.randrange(64))
    elif what == 3:  # another chunk's header and payload, whole: it verifies, but is not this slot's chunk
        arena.headers[slot] = arena.headers[other]
        parts[slot] = parts[other]
    elif what == 4:  # other bytes under the same key, with the checksums that belong to them
        key = bytes(arena.headers["key"][slot])
        reseal = Reservation((key,), (slot,), (int(arena.headers["generation"][slot]),))
        write_payload(arena, reseal, seed=rng.randrange(1, 1000))
    else:
        arena.processes[rng.randrange(len(arena.processes))] = (rng.choice([1, 2, 1 << 63]), rng.randrange(1 << 40))


def scribbler(path: Path, rng: random.Random, until: float, count: Count) -> None:
    if (client := _client(path, "scribbler", until)) is None:
        return
    with closing(client):
        while time.time() < until:
            _scribble(client.arena, rng)
            count()
            time.sleep(0.2)


def scanner(path: Path, rng: random.Random, until: float, count: Count) -> None:
    if (client := _client(path, "scanner", until)) is None:
        return
    with closing(client):
        while time.time() < until:
            chain = [rng.randbytes(32) for _ in range(16)]
            held: Reservation = client.reserve(chain, chain, SHAPE)
            write_payload(client.arena, held, seed=rng.randrange(100))
            if client.commit(held):
                count()
            time.sleep(0.01)


def operator(path: Path, rng: random.Random, until: float, count: Count) -> None:
    asked: list[Callable[[], p.Request]] = [
        lambda: p.Clear(1, None), lambda: p.Clear(1, SHAPE.namespace), lambda: p.Evict(1, rng.randbytes(1)), p.Record,
        p.Settle, lambda: p.Finish(b"", 1, 0.0, 1e9, 0),
    ]  # fmt: skip
    while time.time() < until:
        with suppress(OSError, EOFError, KvkernError), Peer(path) as peer:
            peer.greet(rng.choice([None, GEOMETRY]), engine=f"honest-{rng.randrange(8)}")
            peer.say(rng.choice(asked)(), p.Stat(1))
            peer.hear()
            count()
        time.sleep(0.01)


KINDS: dict[str, Kind] = {
    kind.__name__: kind
    for kind in (silent, half_frames, grant_flood, unread, noise, storm, scribbler, scanner, operator)
}
