"""The client's link against a daemon that misbehaves: every answer is a miss or correct, and every call returns."""

from __future__ import annotations

import fcntl
import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from kvkern.arena.file import Arena
from kvkern.errors import KvkernError
from kvkern.node import framing
from kvkern.node import protocol as p
from kvkern.node.client import reconnecting_link
from kvkern.node.client.cache_client import NodeClient
from tests.node.conftest import GEOMETRY, PATIENCE_S, SIZES, acquired, eventually
from tests.support import chain_keys, make_arena


class FakeDaemon:
    """Welcomes one client after another, then sends whatever a test wants. `answer` is called with every request."""

    def __init__(self, folder: Path, arena: Arena) -> None:
        self.path, self.arena = folder / "s", arena
        self.answer: Callable[[p.Request], list[Any]] = lambda request: []  # messages, or bytes to send as they are
        self.first: list[Any] = [
            p.Welcome(p.VERSION, os.getpid(), SIZES, arena.spec.num_slots, str(arena.path)), p.Changed(b"", b"", True)
        ]  # fmt: skip
        self.with_descriptor = True
        self.welcomed = 0
        self._ending = False
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(self.path))
        self._listener.listen()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def close(self) -> None:
        """End it."""
        self._ending = True
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(str(self.path))
        self._thread.join(PATIENCE_S)
        self._listener.close()

    def _run(self) -> None:
        while not self._ending:
            sock, _ = self._listener.accept()
            sock.settimeout(0.1)
            with sock:
                try:
                    self._serve(sock)
                except ConnectionError:
                    continue

    def _serve(self, sock: socket.socket) -> None:
        frames = framing.FrameSplitter()
        while not self._ending:
            try:
                data = sock.recv(1 << 16)
            except TimeoutError:
                continue
            if not data:
                return
            for body in frames.feed(data):
                request = framing.decode_request(body)
                if isinstance(request, p.Hello):
                    self._welcome(sock)
                else:
                    self._say(sock, self.answer(request))

    def _welcome(self, sock: socket.socket) -> None:
        said = b"".join(map(self._encoded, self.first))
        if self.with_descriptor:
            descriptor = self.arena.descriptor()
            socket.send_fds(sock, [said], [descriptor])
            os.close(descriptor)
        else:
            sock.sendall(said)
        self.welcomed += 1

    def _say(self, sock: socket.socket, messages: list[Any]) -> None:
        for message in messages:
            sock.sendall(self._encoded(message))

    @staticmethod
    def _encoded(message: Any) -> bytes:
        return message if isinstance(message, bytes) else framing.encode(message)


@contextmanager
def faked(folder: Path, tmp_path: Path) -> Iterator[FakeDaemon]:
    arena = make_arena(tmp_path, slots=20)
    fake = FakeDaemon(folder, arena)
    try:
        yield fake
    finally:
        fake.close()
        arena.close()


@pytest.fixture
def fake(folder: Path, tmp_path: Path) -> Iterator[FakeDaemon]:
    with faked(folder, tmp_path) as daemon:
        yield daemon


KEYS = chain_keys("a", 2)


def knows(fake: FakeDaemon) -> None:
    """Make the daemon send an index of two chunks together with Welcome."""
    fake.first[1] = p.Changed(framing.join_keys(KEYS), b"", True)


def test_the_index_that_comes_with_the_welcome_is_kept(fake: FakeDaemon) -> None:
    knows(fake)
    with closing(NodeClient.open(fake.path, "e", GEOMETRY)) as client:
        assert client.lookup(KEYS) == 2


def test_the_arenas_descriptor_is_not_inherited(fake: FakeDaemon) -> None:
    with closing(NodeClient.open(fake.path, "e", GEOMETRY)) as client:
        assert fcntl.fcntl(client.arena._fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC


@pytest.mark.parametrize(
    ("first", "why"),
    [
        ([p.Refused("because")], "the daemon refuses: because"),
        ([p.Draining()], "answers Hello with Draining and no arena"),
        ([p.Welcome(p.VERSION, 1)], "answers Hello with Welcome and no arena"),
        ([framing.encode(p.Stat(1))], "no message"),
        ([b"\xff" * 8], "a frame has 4294967295 bytes, at most 4194304 are allowed"),
        ([p.Welcome(p.VERSION, 1, p.Geometry(256, 2, 1), 19, "x")], "x is not whole: it has"),
        ([p.Welcome(p.VERSION, 1, SIZES, 20, "x"), p.Refused("late")], "the daemon on .* refuses: late"),
    ],
)  # fmt: skip
def test_no_welcome(fake: FakeDaemon, first: list[Any], why: str) -> None:
    fake.first = first
    open_before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(KvkernError, match=why):
        NodeClient.open(fake.path, "e", GEOMETRY)
    eventually(lambda: len(os.listdir("/proc/self/fd")) <= open_before, "as few open files as before")


def test_a_welcome_without_descriptor(fake: FakeDaemon) -> None:
    fake.with_descriptor = False
    with pytest.raises(KvkernError, match="answers Hello with Welcome and no arena"):
        NodeClient.open(fake.path, "e", GEOMETRY)


@pytest.mark.parametrize(
    "answer",
    [
        lambda r: [acquired(r.id, 1, [2], [0])],  # a row that is not in the request
        lambda r: [acquired(r.id, 0, [], [])],
        lambda r: [p.Granted(r.id, [], [], 1)],
        lambda r: [b"\xff" * 8],
        lambda r: [b"\x01\x00\x00\x00\xc0"],
        lambda r: [framing.encode(p.Stat(1))],
        lambda r: [p.Welcome(p.VERSION, 1)],
    ],
    ids=["row", "none", "other", "length", "no_message", "request", "welcome"],
)
def test_a_senseless_answer_is_a_miss(fake: FakeDaemon, answer: Callable[[p.Acquire], list[Any]]) -> None:
    """The thread goes on and connects again if it has to. The next answer is correct."""
    knows(fake)
    senseless = [True]

    def answered(request: p.Request) -> list[Any]:
        if not isinstance(request, p.Acquire):
            return []
        return answer(request) if senseless[0] else [acquired(request.id, 1, [0, 1], [3, 4])]

    fake.answer = answered
    with closing(NodeClient.open(fake.path, "e", GEOMETRY)) as client:
        assert client.acquire_soon(KEYS).result(PATIENCE_S).keys == ()
        senseless[0] = False
        eventually(lambda: client.lookup(KEYS) == 2)
        assert client.acquire_soon(KEYS).result(PATIENCE_S).slots == (3, 4)


def test_answers_that_nobody_waits_for(fake: FakeDaemon) -> None:
    knows(fake)
    fake.answer = lambda request: [
        acquired(1 << 40, 1, [0], [0]), p.Published(0, [True]), p.Changed(b"", KEYS[1]),
        *([acquired(request.id, 1, [0], [3])] * 2 if isinstance(request, p.Acquire) else []),
    ]  # fmt: skip
    with closing(NodeClient.open(fake.path, "e", GEOMETRY)) as client:
        for _ in range(3):
            assert client.acquire_soon(KEYS[:1]).result(PATIENCE_S).slots == (3,)
        eventually(lambda: client.lookup(KEYS) == 1)
    assert fake.welcomed == 1


def test_a_daemon_that_never_answers(fake: FakeDaemon, monkeypatch: pytest.MonkeyPatch) -> None:
    """The client treats it as gone, again and again, and every call returns."""
    monkeypatch.setattr(reconnecting_link, "ANSWER_S", 0.1)
    knows(fake)
    with closing(NodeClient.open(fake.path, "e", GEOMETRY)) as client:
        for _ in range(3):
            eventually(lambda: client.lookup(KEYS) == 2)
            assert client.acquire_soon(KEYS).result(PATIENCE_S).keys == ()
    assert fake.welcomed >= 2


def test_news_that_has_not_been_read_yet_is_not_overlooked(fake: FakeDaemon) -> None:
    """A store is acknowledged once the change was sent to all clients. A reader that has not read it yet asks the daemon."""
    fake.answer = lambda request: [acquired(request.id, 1, [0], [3])] if isinstance(request, p.Acquire) else []
    with closing(NodeClient.open(fake.path, "e", GEOMETRY)) as client:
        assert client.acquire_soon(KEYS).done()
        link = client._link
        for unread in ("_reading", "_splitter"):
            with client._lock, pytest.MonkeyPatch.context() as patch:
                patch.setattr(link, unread, True)
                assert link.has_unread()
                soon = client.acquire_soon(KEYS)
                assert not soon.done()
            assert soon.result(PATIENCE_S).slots == (3,)


def test_a_daemon_that_reads_nothing(fake: FakeDaemon, monkeypatch: pytest.MonkeyPatch) -> None:
    """The outbox is bounded: above the limit the client treats the daemon as gone."""
    monkeypatch.setattr(reconnecting_link, "MAX_UNSENT_NBYTES", 1 << 20)
    monkeypatch.setattr(reconnecting_link, "CONNECT_S", 0.5)
    stuck, go = threading.Event(), threading.Event()

    def answer(request: p.Request) -> list[Any]:
        if isinstance(request, p.Release):
            stuck.set()
            go.wait(PATIENCE_S)
        return []

    fake.answer = answer
    with closing(NodeClient.open(fake.path, "e", GEOMETRY)) as client:
        try:
            with client._lock:
                client._link.send(p.Release([]))
            assert stuck.wait(PATIENCE_S)
            for _ in range(40):
                with client._lock:
                    client._link.send(p.Release(list(range(1 << 15))))
            eventually(lambda: not client.connected)
            assert client._link._unsent_nbytes == 0
        finally:
            go.set()
