"""What an operator asks a daemon: one blocking request at a time, over a session without an arena, or a recording."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ...errors import ConfigError
from .. import protocol as p

TIMEOUT_S = 10.0


class AdminClient:
    """Use as a context manager. Raises ConfigError if no daemon answers or it refuses."""

    def __init__(self, path: Path) -> None:
        self._path = p.checked_path(path)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        self._socket.settimeout(TIMEOUT_S)
        self._frames = p.Frames()
        self._ready: list[bytes] = []

    def __enter__(self) -> AdminClient:
        try:
            self._socket.connect(str(self._path))
            self._socket.sendall(p.encode(p.Hello(p.VERSION)))
            first = self._receive()
        except OSError as error:
            self._socket.close()
            raise p.unreachable(self._path, error) from error
        except p.ProtocolError:
            self._socket.close()
            raise
        if isinstance(first, p.Welcome):
            return self
        self._socket.close()
        if isinstance(first, p.Refused):
            raise ConfigError(f"the daemon refuses: {first.reason}")
        raise p.ProtocolError(f"the daemon answers Hello with {type(first).__name__}")

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def ask(self, request: p.Stat | p.List | p.Evict | p.Clear) -> list[dict[str, Any]]:
        """The daemon's rows. Raises ConfigError if it does not answer."""
        try:
            self._socket.sendall(p.encode(request))
            while isinstance(answer := self._receive(), p.Draining):
                continue
        except OSError as error:
            raise ConfigError(f"the daemon on {self._path} does not answer ({error.strerror or error})") from error
        if not isinstance(answer, p.Answer):
            raise p.ProtocolError(f"the daemon answers with {type(answer).__name__}")
        return answer.rows

    def recorded(
        self,
        idle_s: float = 0.5,  # None is yielded at least so often while no request ends
    ) -> Iterator[p.Recorded | None]:
        """Requests of all engines, as they end, until the daemon ends. The daemon hangs up on who reads too slowly."""
        self._socket.settimeout(idle_s)
        asked = False
        while True:
            try:
                if not asked:
                    self._socket.sendall(p.encode(p.Record()))
                    asked = True
                message = self._receive()
            except TimeoutError:
                yield None
            except OSError:
                return
            else:
                if isinstance(message, p.Recorded):
                    yield message

    def _receive(self) -> p.Response:
        while not self._ready:
            data = self._socket.recv(1 << 16)
            if not data:
                raise ConnectionError("it hung up")
            self._ready += self._frames.feed(data)
        return p.decode_response(self._ready.pop(0))
