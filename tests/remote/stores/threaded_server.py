"""A server for tests on a port of 127.0.0.1: accepts clients in a thread, and ends sockets and threads when it is closed."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from contextlib import suppress


class ThreadedServer:
    """A subclass says in `_welcome` what it does with a client. Call `start` when it is ready, and `close` in the end."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self._sockets: list[socket.socket] = []
        self._threads: list[threading.Thread] = []

    def start(self) -> None:
        """Begin to accept clients."""
        self._run(self._accept)

    def close(self) -> None:
        """End all connections. Returns when all threads have ended."""
        for sock in (self._listener, *self._sockets):
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()
        for thread in self._threads:
            thread.join()

    def _welcome(self, client: socket.socket) -> None:
        raise NotImplementedError

    def _run(self, target: Callable[..., None], *args: socket.socket) -> None:
        thread = threading.Thread(target=target, args=args)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            self._sockets.append(client)
            self._welcome(client)
