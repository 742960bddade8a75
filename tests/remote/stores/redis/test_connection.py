"""A connection's reader and writer, against the other end of a socket pair."""

from __future__ import annotations

import re
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from kvkern.remote.stores.base import Got, RemoteError
from tests.remote.required_servers import need


class Connected:
    """The part of redis.Connection that RedisConnection uses."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock

    def disconnect(self) -> None:
        self._sock.close()


class Pair:
    """A RedisConnection and its other end."""

    def __init__(self) -> None:
        from kvkern.remote.stores.redis.connection import RedisConnection

        ours, self.theirs = socket.socketpair()
        self.theirs.settimeout(20)
        self.connection = RedisConnection(Connected(ours), ("h", 1), "h:1")
        self._threads: list[threading.Thread] = []

    def behind(self, call: Callable[[], Any]) -> None:
        self._threads.append(threading.Thread(target=call))
        self._threads[-1].start()

    def say(self, data: bytes, step: int, pause_s: float = 0.0) -> None:
        """Send `data` in pieces of `step` bytes."""

        def talk() -> None:
            for at in range(0, len(data), step):
                try:
                    self.theirs.sendall(data[at : at + step])
                except OSError:
                    return
                time.sleep(pause_s)

        self.behind(talk)

    def close(self) -> None:
        self.connection.close()
        for thread in self._threads:
            thread.join()
        self.theirs.close()


@pytest.fixture
def pair() -> Iterator[Pair]:
    need("redis", module="redis")
    pair = Pair()
    yield pair
    pair.close()


def soon(seconds: float = 20.0) -> float:
    return time.monotonic() + seconds


def noise(nbytes: int) -> bytes:
    return np.random.default_rng(nbytes).bytes(nbytes)


SMALL, LARGE = [(0, 0), (1, 0), (0, 1), (5, 3), (100, 0)], [(4096, 4096), (4095, 9000)]


@pytest.mark.parametrize(("sizes", "step"), [
    *((sizes, step) for sizes in SMALL for step in (1, 2, 3, 7, 1 << 20)),
    *((sizes, step) for sizes in LARGE for step in (99, 4095, 4096, 4097, 1 << 20)),
])  # fmt: skip
def test_replies_in_pieces_of_any_size(pair: Pair, sizes: tuple[int, int], step: int) -> None:
    nbytes = sum(sizes)
    value = noise(nbytes)
    reply = b"$%d\r\n%s\r\n" % (nbytes, value)
    pair.say(b"+OK\r\n" + reply + b"$-1\r\n" + reply + reply + b":1\r\n", step)
    connection, memory = pair.connection, bytearray(b"\xee" * (nbytes + 2))
    header, payload = memoryview(memory)[1 : 1 + sizes[0]], memoryview(memory)[1 + sizes[0] : 1 + nbytes]
    assert connection.read_line(soon()) == b"+OK"
    for read in (True, False, True):
        if read is False:
            assert connection.bulk_length(connection.read_line(soon())) is None
            assert connection.bulk_length(connection.read_line(soon())) == nbytes
            connection.skip_bulk(nbytes, soon())
            continue
        memory[1:-1] = bytes(nbytes)
        assert connection.bulk_length(connection.read_line(soon())) == nbytes
        connection.read_bulk((header, payload), soon())
        assert memory == b"\xee" + value + b"\xee"
    assert connection.read_line(soon()) == b":1"
    assert connection.is_idle()


def test_what_is_sent_arrives_in_order(pair: Pair) -> None:
    """Thousands of pieces, small and large, through a socket that takes little at a time."""
    pieces = [memoryview(noise(n)) for n in (0, 1, 500, 70_000, 0, 8191, 8192, 8193, 300_000) * 300][:1200]
    whole = b"".join(pieces)
    received = bytearray()

    def receive() -> None:
        while len(received) < len(whole):
            received.extend(pair.theirs.recv(100_000))

    pair.behind(receive)
    pair.connection.send(pieces, soon())
    pair.connection.send([], soon())
    pair.close()
    assert received == whole


def test_a_trickle_ends_in_time(pair: Pair) -> None:
    """The deadline counts for the whole reply, however many bytes come in time."""
    pair.say(b"$1000\r\n" + bytes(1000), 1, pause_s=0.02)
    began = time.monotonic()
    assert pair.connection.bulk_length(pair.connection.read_line(soon(5))) == 1000
    with pytest.raises(TimeoutError):
        pair.connection.read_bulk([memoryview(bytearray(1000))], soon(0.2))
    assert time.monotonic() - began < 2


def test_a_reader_that_reads_nothing(pair: Pair) -> None:
    began = time.monotonic()
    with pytest.raises(TimeoutError):
        pair.connection.send([bytes(50 << 20)], soon(0.2))
    assert time.monotonic() - began < 2


def test_the_end(pair: Pair) -> None:
    pair.theirs.sendall(b"$10\r\n123")
    pair.theirs.shutdown(socket.SHUT_WR)
    assert pair.connection.bulk_length(pair.connection.read_line(soon())) == 10
    with pytest.raises(ConnectionResetError, match="closed by the server"):
        pair.connection.read_bulk([memoryview(bytearray(10))], soon())
    assert not pair.connection.is_idle()


@pytest.mark.parametrize(
    "line", [b"", b"$", b"$-2", b"$+1", b"$1_0", b"$4294967296", b"$1 ", b"*1", b":1", "$٣".encode()]
)
def test_lengths_that_are_none(pair: Pair, line: bytes) -> None:
    with pytest.raises(RemoteError, match=r"h:1 sent .* which is no answer"):
        pair.connection.bulk_length(line)


def test_a_window_is_never_exceeded(pair: Pair) -> None:
    """At most one window of commands is sent, and all replies come in order."""
    from kvkern.remote.stores.redis.batch import ConnectionShare, GetBatch

    value, most = noise(100_000), 0
    memory = [memoryview(bytearray(100_000)) for _ in range(40)]
    batch = GetBatch([b"%02d" % i for i in range(40)], [(piece[:4096], piece[4096:]) for piece in memory])
    asked: list[int] = []

    def serve() -> None:
        nonlocal most
        text = b""
        for answered in range(40):
            while len(asked) == answered or len(text) % 21:  # the length of a GET of two letters
                text += pair.theirs.recv(1 << 16)
                asked[:] = [int(number) for number in re.findall(rb"GET\r\n\$2\r\n(\d\d)", text)]
            most = max(most, len(asked) - answered)
            pair.theirs.sendall(b"$100000\r\n%s\r\n" % value)

    pair.behind(serve)
    share = ConnectionShare(batch, deque(range(40)), 500_000, soon())
    share.drive(pair.connection)
    pair.close()
    assert batch.outcome([]) == [Got.HIT] * 40
    assert all(piece == value for piece in memory)
    assert asked == list(range(40))
    assert most <= 5
