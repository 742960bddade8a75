"""A server that means harm: it drips, never ends, or sends more than anybody asked for. It notes the memory of its victim."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

MIB = 1 << 20
_ZEROS = bytes(MIB)

Talk = Callable[["HostileServer", socket.socket], None]


def memory_nbytes() -> int:
    """Return the memory of this process, which runs the client too."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class HostileServer:
    """Talks to every client on a port of 127.0.0.1, each in a thread. Use it as a context manager."""

    def __init__(self, talk: Talk) -> None:
        self.ended = threading.Event()
        self.most_nbytes = 0  # the most memory that this process has taken while something was poured
        self._before_nbytes = memory_nbytes()
        self._talk = talk
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self._sockets: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

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
        for sock in (self._listener, *self._sockets):
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()
        for thread in self._threads:
            thread.join()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            self._sockets.append(client)
            self._threads.append(threading.Thread(target=self._serve, args=(client,)))
            self._threads[-1].start()

    def _serve(self, client: socket.socket) -> None:
        with suppress(OSError):
            self._talk(self, client)
        with suppress(OSError):
            client.shutdown(socket.SHUT_RDWR)
