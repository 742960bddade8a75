"""A server that means harm: it drips, never ends, or sends more than anybody asked for. It notes the memory of its victim."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from tests.remote.stores.threaded_server import ThreadedServer

MIB = 1 << 20
_ZEROS = bytes(MIB)

Talk = Callable[["HostileServer", socket.socket], None]


def memory_nbytes() -> int:
    """Return the memory of this process, which runs the client too."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class HostileServer(ThreadedServer):
    """Talks to every client on a port of 127.0.0.1, each in a thread. Use it as a context manager."""

    def __init__(self, talk: Talk) -> None:
        super().__init__()
        self.ended = threading.Event()
        self.most_nbytes = 0  # the most memory that this process has taken while something was poured
        self._before_nbytes = memory_nbytes()
        self._talk = talk
        self.start()

    def drip(self, sock: socket.socket, text: bytes, seconds: float = 60.0) -> None:
        """Send a byte after the other, again and again, so that something comes all the time."""
        for number in range(int(seconds / 0.02)):
            sock.sendall(text[number % len(text) :][:1])
            if self.ended.wait(0.02):
                return

    def pour(self, sock: socket.socket, nbytes: int = 1536 * MIB) -> None:
        """Send zeros as fast as the client takes them."""
        for _ in range(nbytes // MIB):
            if self.ended.is_set():
                return
            sock.sendall(_ZEROS)
            self.most_nbytes = max(self.most_nbytes, memory_nbytes() - self._before_nbytes)

    def __enter__(self) -> HostileServer:
        return self

    def __exit__(self, *error: object) -> None:
        self.ended.set()
        self.close()

    def _welcome(self, client: socket.socket) -> None:
        self._run(self._serve, client)

    def _serve(self, client: socket.socket) -> None:
        with suppress(OSError):
            self._talk(self, client)
        with suppress(OSError):
            client.shutdown(socket.SHUT_RDWR)
