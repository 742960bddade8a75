"""One HTTP connection: uvicorn's HTTP/1.1 behind limits that uvicorn lacks. Knows no paths.

    waiting     until a whole head has come: at most MAX_HEAD_NBYTES and MAX_LINES, within HEAD_S from its first byte
    queued      until the pacer lets it begin
    answering   one request at a time; what is sent ahead waits unread
    closing     until the other side has read the rest, at most LINGER_S

A request with a body is refused by the app, and its body is never read. Unread answers fill the socket and then wait.
"""

from __future__ import annotations

import asyncio
import enum
import logging
import re
from typing import Protocol

from uvicorn.config import Config
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from .pacer import Pacer

MAX_HEAD_NBYTES = 16 << 10
MAX_LINES = 64  # of a head
MAX_FIRST_LINE_NBYTES = 4 << 10  # method and path: a path is decoded, which takes longer than the rest
HEAD_S = 10.0  # for a head to arrive, from the connection or from its first byte on
IDLE_S = 75.0  # between two requests; Prometheus asks every 15 to 60 seconds
ANSWER_S = 30.0  # for an answer, but for streams
STALLED_S = 20.0  # for the other side to read some of an answer
LINGER_S = 2.0

_END = re.compile(rb"\n\r?\n")
_logger = logging.getLogger("kvkern.http")
_logger.setLevel(logging.ERROR)  # a stranger's wrong request is no news; a fault of a handler is


class Phase(enum.Enum):
    """What a connection is doing."""

    WAITING = enum.auto()
    QUEUED = enum.auto()
    ANSWERING = enum.auto()
    CLOSING = enum.auto()


class Port(Protocol):
    """What a connection needs from the port that accepted it."""

    config: Config
    state: ServerState
    pacer: Pacer
    loop: asyncio.AbstractEventLoop

    def enter(self, connection: HttpConnection) -> None:
        """Count the connection."""

    def leave(self, connection: HttpConnection) -> None:
        """Stop counting it. May be called twice."""


class HttpConnection(H11Protocol):
    """Runs in the event loop's thread."""

    def __init__(
        self,
        port: Port,
        address: str,  # of the other side, for its share
    ) -> None:
        super().__init__(port.config, port.state, {"connection": self}, port.loop)
        self.access_log, self.logger = False, _logger
        self.address = address
        self.phase = Phase.WAITING
        self.since_s = port.loop.time()  # when the phase began; of a head: when its first byte came
        self.streams = False  # its answer has no end
        self._port = port
        self._received = bytearray()
        self._searched = 0  # bytes of `_received` that hold no end of a head
        self._served = False
        self._stalled_s: float | None = None  # since when nothing is read
        port.enter(self)

    # -- what asyncio calls --------------------------------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        """Begin the request when its head is complete."""
        if self.phase is Phase.CLOSING:
            return
        if not self._received and self.phase is Phase.WAITING:
            self.since_s = self._port.loop.time()
        self._received += data
        self._advance()

    def pause_writing(self) -> None:
        """The other side reads too slowly."""
        self._stalled_s = self._port.loop.time()
        super().pause_writing()

    def resume_writing(self) -> None:
        """The other side has read most of it."""
        self._stalled_s = None
        super().resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection."""
        self.phase = Phase.CLOSING
        self._received.clear()
        self._port.pacer.forget(self)
        self._port.leave(self)
        super().connection_lost(exc)

    # -- what uvicorn calls --------------------------------------------------------------------------------------------

    def on_response_complete(self) -> None:
        """Go on with the next request of this connection."""
        super().on_response_complete()
        self._unset_keepalive_if_required()  # `watch` keeps the time
        if self.transport.is_closing():
            self._enter(Phase.CLOSING)
        elif self.phase is Phase.ANSWERING:
            self._served = True
            self._enter(Phase.WAITING)
            self._advance()

    # -- what the port calls -------------------------------------------------------------------------------------------

    @property
    def idle(self) -> bool:
        """True while it has no complete request: it may be closed to make room."""
        return self.phase is Phase.WAITING

    def begin(self) -> None:
        """Answer the request whose head has come."""
        if self.phase is not Phase.QUEUED or (end := _END.search(self._received)) is None:
            return
        head = bytes(self._received[: end.end()])
        del self._received[: end.end()]
        self._searched = 0
        if len(head) > MAX_HEAD_NBYTES or head.count(b"\n") > MAX_LINES:
            self._refuse(b"431 Request Header Fields Too Large")
            return
        if head.index(b"\n") > MAX_FIRST_LINE_NBYTES:
            self._refuse(b"414 URI Too Long")
            return
        self._enter(Phase.ANSWERING)
        if len(self._received) <= MAX_HEAD_NBYTES:
            self.flow.resume_reading()
        super().data_received(head)
        if self.transport.is_closing():
            self._enter(Phase.CLOSING)

    def watch(self, now_s: float) -> None:
        """Hang up if something takes too long. Call it regularly, with the loop's time."""
        since_s = now_s - self.since_s
        if self.transport.is_closing() and self.phase is not Phase.CLOSING:
            self._enter(Phase.CLOSING)
        elif self.phase is Phase.WAITING and since_s > (IDLE_S if self._served and not self._received else HEAD_S):
            self.hang_up()
        elif self._is_late(now_s, since_s):
            self.transport.abort()

    def hang_up(self) -> None:
        """Close the connection at once if answers are unread, else in good order."""
        self._enter(Phase.CLOSING)
        if self.transport.get_write_buffer_size():
            self.transport.abort()
        else:
            self.transport.close()

    # -- inside --------------------------------------------------------------------------------------------------------

    def _is_late(self, now_s: float, since_s: float) -> bool:
        if self._stalled_s is not None and now_s - self._stalled_s > STALLED_S:
            return True
        if self.phase is Phase.ANSWERING:
            return not self.streams and since_s > ANSWER_S
        return self.phase is Phase.CLOSING and since_s > LINGER_S

    def _advance(self) -> None:
        too_long = len(self._received) > MAX_HEAD_NBYTES
        if self.phase is not Phase.WAITING:
            if too_long:
                self.flow.pause_reading()
        elif not self._received:
            return
        elif not self._received[:1].isalpha():  # no method begins so; TLS does not either
            self._refuse(b"400 Bad Request")
        elif self._has_end():
            self._enter(Phase.QUEUED)
            if too_long:
                self.flow.pause_reading()
            self._port.pacer.ask(self)
        elif too_long:
            self._refuse(b"431 Request Header Fields Too Large")

    def _has_end(self) -> bool:
        """Return True if the head is complete. Looks at each byte once, however many pieces they come in."""
        start, self._searched = max(0, self._searched - 2), len(self._received)
        return _END.search(self._received, start) is not None

    def _refuse(self, status: bytes) -> None:
        self._received.clear()
        self._enter(Phase.CLOSING)
        self.transport.write(b"HTTP/1.1 " + status + b"\r\nConnection: close\r\nContent-Length: 0\r\n\r\n")
        self.transport.close()

    def _enter(self, phase: Phase) -> None:
        self.phase, self.since_s = phase, self._port.loop.time()
