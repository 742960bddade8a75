"""A bare connection to a daemon. Imports little, so that processes that use it start fast."""

from __future__ import annotations

import os
import socket
from contextlib import suppress
from pathlib import Path

from kvkern.arena.slots import SlotGeometry
from kvkern.node import framing
from kvkern.node import protocol as p

GEOMETRY = SlotGeometry(part_nbytes=256, max_planes=2, world_size=1)  # a slot takes 8 KiB
SIZES = p.Geometry.from_slots(GEOMETRY)
PATIENCE_S = 30.0  # generous: a condition that takes this long is never met


class Peer:
    """A bare connection that may send any message."""

    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        self.socket.settimeout(PATIENCE_S)
        self.socket.connect(str(path))
        self._frames = framing.FrameSplitter()
        self._bodies: list[bytes] = []

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def say(self, *messages: p.Request) -> Peer:
        """Send messages in one write."""
        self.socket.sendall(b"".join(map(framing.encode, messages)))
        return self

    def greet(self, geometry: SlotGeometry | None = GEOMETRY, index: bool = False, engine: str = "peer") -> p.Response:
        """Send Hello. Returns the first answer."""
        sizes = geometry and p.Geometry.from_slots(geometry)
        with suppress(BrokenPipeError):  # a daemon that refuses this user does not wait for Hello
            self.say(p.Hello(p.VERSION, engine, sizes, index))
        return self.hear()

    def hear(self) -> p.Response:
        """Return the next message. Raises EOFError if the connection ends first."""
        while not self._bodies:
            data, descriptors, _flags, _address = socket.recv_fds(self.socket, 1 << 16, 4)
            for descriptor in descriptors:
                os.close(descriptor)
            if not data:
                raise EOFError
            self._bodies += self._frames.feed(data)
        return framing.decode_response(self._bodies.pop(0))

    def hung_up(self) -> bool:
        """Read until the daemon ends the connection. Fails if it does not."""
        try:
            while True:
                self.hear()
        except (EOFError, ConnectionResetError):
            return True
