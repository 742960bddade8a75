"""Sends wrong frames to a daemon: `python -m tests.node.fuzzer SOCKET SEED ROUNDS`.

Every round is a connection. It may send Hello. Then it sends noise; valid frames in any order; frames that are replayed,
changed, cut short or of an impossible length; and slots, generations and leases that it does not hold. Clear and Evict are
left out, because every client that may connect may send them, and they would remove what others have stored.
"""

from __future__ import annotations

import random
import socket
import struct
import sys
from collections.abc import Callable
from pathlib import Path

from kvkern.node import framing
from kvkern.node import protocol as p
from kvkern.policy.base import Stop

GEOMETRY = p.Geometry(256, 2, 1)
LARGE_NBYTES = 1 << 20


def keys(rng: random.Random) -> list[bytes]:
    return [rng.randbytes(32) for _ in range(rng.choice([0, 1, 3, 50]))]


def number(rng: random.Random, below: int) -> int:
    """Return a number that is often small, so that another client may hold it."""
    return rng.choice([0, 1, rng.randrange(128), below - 1, rng.randrange(below)])


def use(rng: random.Random) -> tuple[int, int, Stop, int]:
    return number(rng, 1 << 32), number(rng, 1 << 31) - 1, rng.choice(list(Stop)), number(rng, 1 << 53)


def message(rng: random.Random) -> p.Request:
    """Return a valid message that makes no sense here."""
    slots = [number(rng, 1 << 40) for _ in range(rng.choice([0, 1, 3, 200]))]
    generations = [number(rng, 1 << 63) for _ in slots]
    makers: list[Callable[[], p.Request]] = [
        lambda: p.Hello(rng.choice([0, 1, 2, 2, 2]), "fuzz", rng.choice([None, GEOMETRY]), rng.random() < 0.5),
        lambda: p.Describe(number(rng, 1 << 53), bytes(31) + rng.randbytes(1), {"model": "m" * rng.randrange(200)}),
        lambda: p.Acquire(
            number(rng, 1 << 53), framing.join_keys(keys(rng)), rng.random() < 0.5, rng.choice([b"", rng.randbytes(32), b"x"]),
            *use(rng),
        ),
        lambda: p.Release([number(rng, 1 << 53) for _ in range(5)]),
        lambda: p.Grant(number(rng, 1 << 53), number(rng, 65536)),
        lambda: p.Publish(
            1, rng.randbytes(32), slots, generations,
            framing.join_keys([rng.randbytes(32) for _ in slots]), framing.join_keys(keys(rng)), *use(rng),
        ),
        lambda: p.GiveBack(slots),
        lambda: p.Settle(),
        lambda: p.Finish(framing.join_keys(keys(rng)), number(rng, 1 << 31), rng.random(), rng.random(), *use(rng)),
        lambda: p.Record(),
        lambda: p.Stat(number(rng, 1 << 53)),
        lambda: p.List(1, rng.randbytes(rng.randrange(3)), rng.randrange(1, 1001)),
    ]  # fmt: skip
    return rng.choice(makers)()


def changed(rng: random.Random, frame: bytes) -> bytes:
    """Change one to three bytes."""
    found = bytearray(frame)
    for _ in range(rng.randrange(1, 4)):
        found[rng.randrange(len(found))] = rng.randrange(256)
    return bytes(found)


def speech(rng: random.Random) -> bytes:
    """Return the bytes to send in one round."""
    hello = framing.encode(p.Hello(p.VERSION, "fuzz", GEOMETRY, rng.random() < 0.5))
    frames = [framing.encode(message(rng)) for _ in range(rng.randrange(1, 12))]
    makers: list[Callable[[], bytes]] = [
        lambda: rng.randbytes(rng.randrange(1, 200)),
        lambda: struct.pack("<I", (size := rng.randrange(300))) + rng.randbytes(size),
        lambda: (
            hello + struct.pack("<I", rng.choice([framing.MAX_FRAME_NBYTES + 1, (1 << 32) - 1])) + rng.randbytes(100)
        ),
        lambda: (
            hello + struct.pack("<I", framing.MAX_FRAME_NBYTES) + bytes(LARGE_NBYTES)
        ),  # the rest of the frame never comes
        lambda: hello + b"".join(frames),
        lambda: b"".join(frames),
        lambda: hello + frames[0] * 20,
        lambda: hello + b"".join(changed(rng, frame) for frame in frames),
        lambda: hello + frames[0] + changed(rng, frames[-1]),
        lambda: (hello + b"".join(frames))[: rng.randrange(1, 60)],
        lambda: hello * 2,
    ]
    return rng.choice(makers)()


def speak(path: Path, rng: random.Random) -> None:
    """Do one round. The daemon may hang up at any moment."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(30)
        sock.connect(str(path))
        said = speech(rng)
        cuts = sorted(rng.randrange(len(said)) for _ in range(rng.randrange(3)))
        try:
            for begin, end in zip([0, *cuts], [*cuts, len(said)], strict=True):
                sock.sendall(said[begin:end])
            if rng.random() < 0.5:  # else this side closes before it is answered
                sock.shutdown(socket.SHUT_WR)
                while sock.recv(1 << 16):
                    continue
        except ConnectionError:
            return


def main() -> None:
    path, seed, rounds = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    rng = random.Random(seed)
    for _ in range(rounds):
        speak(path, rng)


if __name__ == "__main__":
    main()
