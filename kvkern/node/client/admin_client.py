"""An operator's client: one blocking request at a time over a session without an arena, or a recording of requests."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ...errors import ConfigError, KvkernError
from .. import framing
from .. import protocol as p
from .daemon_identity import check_daemon
from .reconnecting_link import send_hello

TIMEOUT_S = 10.0


class AdminClient:
    """Use as a context manager. Entering raises ConfigError if no daemon answers, or it refuses, or is another user's."""

    def __init__(
        self,
        path: Path,
        daemon_uid: int = -1,  # a user that may serve, beside root and this process's own; negative: none
        timeout_s: float | None = None,  # how long each answer may take; None: TIMEOUT_S
    ) -> None:
        self._daemon_uid = daemon_uid
        self._path = framing.checked_socket_path(path)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        self._socket.settimeout(TIMEOUT_S if timeout_s is None else timeout_s)
        self._splitter = framing.FrameSplitter()
        self._bodies: list[bytes] = []  # of received frames, not yet decoded

    def __enter__(self) -> AdminClient:
        try:
            self._connect()
            check_daemon(self._socket, self._path, self._daemon_uid)
            send_hello(self._socket, p.Hello(p.VERSION))
            first = self._receive()
        except OSError as error:
            self._socket.close()
            raise framing.connect_error(self._path, error) from error
        except KvkernError:
            self._socket.close()
            raise
        if isinstance(first, p.Welcome):
            return self
        self._socket.close()
        if isinstance(first, p.Refused):
            raise ConfigError(f"the daemon refuses: {first.reason}")
        raise p.ProtocolError(
            f"the daemon on {self._path} answers Hello with {type(first).__name__}; "
            f"use the same version of kvkern on both sides"
        )

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def ask(self, request: p.Stat | p.List | p.Evict | p.Clear) -> list[dict[str, Any]]:
        """Send a request and return the rows of the answer. Raises ConfigError if the daemon refuses or does not answer."""
        try:
            self._socket.sendall(framing.encode(request))
            while isinstance(answer := self._receive(), p.Draining):
                continue
        except OSError as error:
            raise ConfigError(
                f"the daemon on {self._path} does not answer ({error.strerror or error}); "
                f"look at its log, or restart it, then try again"
            ) from error
        if isinstance(answer, p.Refused):
            raise ConfigError(f"the daemon refuses: {answer.reason}")
        if not isinstance(answer, p.Answer):
            raise p.ProtocolError(
                f"the daemon on {self._path} answers with {type(answer).__name__}; "
                f"use the same version of kvkern on both sides"
            )
        return answer.rows

    def recorded_requests(
        self,
        idle_s: float = 0.5,  # yield None at least this often while no request ends
    ) -> Iterator[p.Recorded | None]:
        """Yield the requests of all engines as they end, until the daemon hangs up.

        The daemon hangs up when it ends, and on a client that reads too slowly. Raises ConfigError if it refuses.
        """
        self._socket.settimeout(idle_s)
        asked = False
        while True:
            try:
                if not asked:
                    self._socket.sendall(framing.encode(p.Record()))
                    asked = True
                message = self._receive()
            except TimeoutError:
                yield None
            except OSError:
                return
            else:
                if isinstance(message, p.Refused):
                    raise ConfigError(f"the daemon refuses: {message.reason}")
                if isinstance(message, p.Recorded):
                    yield message

    def _connect(self) -> None:
        """Connect. While more clients wait than the kernel queues, try again."""
        deadline = time.monotonic() + TIMEOUT_S
        while True:
            try:
                return self._socket.connect(str(self._path))
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.05)

    def _receive(self) -> p.Response:
        while not self._bodies:
            data = self._socket.recv(1 << 16)
            if not data:
                raise ConnectionError("the daemon hung up")
            self._bodies += self._splitter.feed(data)
        return framing.decode_response(self._bodies.pop(0))
