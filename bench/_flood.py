"""Tools of bench/node.py: a process that floods a daemon with requests from many connections. Measures nothing."""

from __future__ import annotations

import selectors
import socket
from contextlib import ExitStack, suppress
from multiprocessing.connection import Connection
from pathlib import Path

from _node import SPAWN, sequence

from kvkern.arena.slots import SlotGeometry
from kvkern.node import framing, protocol

CONNECTIONS = 30
BATCH_NBYTES = 219_000  # of requests that a connection sends without waiting for an answer
KINDS = {  # kind of flood: (a request, read the answers)
    "unread": (framing.encode(protocol.Stat(1)), False),
    "read": (framing.encode(protocol.Acquire(1, b"".join(sequence("flood")), True)), True),
}


class _Flood:
    """Connections that are always as full of requests as the daemon lets them be."""

    def __init__(self, path: Path, geometry: SlotGeometry, kind: str) -> None:
        request, self._reads = KINDS[kind]
        self._path, self._batch = path, request * (BATCH_NBYTES // len(request))
        sizes = protocol.Geometry.from_slots(geometry)
        self._hello = framing.encode(protocol.Hello(protocol.VERSION, "flood", sizes))
        self._selector = selectors.DefaultSelector()
        for _ in range(CONNECTIONS):
            self._connect()

    def close(self) -> None:
        for key in list(self._selector.get_map().values()):
            self._hang_up(key)
        self._selector.close()

    def step(self) -> None:
        for key, events in self._selector.select(0.01):
            assert isinstance(key.fileobj, socket.socket)
            try:
                with suppress(BlockingIOError):
                    if events & selectors.EVENT_READ:
                        key.fileobj.recv(1 << 20)
                    if events & selectors.EVENT_WRITE:
                        sent = key.fileobj.send(key.data[0])
                        key.data[0] = key.data[0][sent:] or self._batch
            except OSError:  # the daemon has hung up
                self._hang_up(key)
                self._connect()

    def _connect(self) -> None:
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(str(self._path))
        sock.sendall(self._hello)
        sock.recv(1 << 16)
        sock.setblocking(False)
        events = selectors.EVENT_WRITE | (selectors.EVENT_READ if self._reads else 0)
        self._selector.register(sock, events, [self._batch])

    def _hang_up(self, key: selectors.SelectorKey) -> None:
        assert isinstance(key.fileobj, socket.socket)
        self._selector.unregister(key.fileobj)
        key.fileobj.close()


def flood_main(pipe: Connection, path: Path, geometry: SlotGeometry, kind: str) -> None:
    """Flood from one message of the pipe to the next."""
    pipe.send("ready")
    while pipe.recv():
        with ExitStack() as stack:
            flood = _Flood(path, geometry, kind)
            stack.callback(flood.close)
            pipe.send("floods")
            while not pipe.poll():
                flood.step()
        pipe.send(pipe.recv())


class Flooder:
    """A process that floods a daemon while the code in `with` runs. `close` ends it."""

    def __init__(self, path: Path, geometry: SlotGeometry, kind: str) -> None:
        self._pipe, theirs = SPAWN.Pipe()
        self._process = SPAWN.Process(target=flood_main, args=(theirs, path, geometry, kind), daemon=True)
        self._process.start()
        theirs.close()
        self._pipe.recv()

    def __enter__(self) -> Flooder:
        self._pipe.send("begin")
        self._pipe.recv()
        return self

    def __exit__(self, *_: object) -> None:
        self._pipe.send("end")
        self._pipe.recv()

    def close(self) -> None:
        self._process.terminate()
        self._process.join()
