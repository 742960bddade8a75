"""One client's connection to the daemon: cuts its bytes into requests and queues its answers.

It hangs up on a client that breaks the protocol, and on a client whose unread answers would fill the memory.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from typing import Protocol

from ...config import format_nbytes
from ...errors import KvkernError
from .. import framing
from .. import protocol as p
from .peer_credentials import peer_credentials
from .sessions import Session

logger = logging.getLogger("kvkern")

HELLO_S = 5.0  # a connection that has not sent Hello by then is closed
MAX_UNSENT_NBYTES = 64 << 20  # answers queued for one client
MAX_CONNECTIONS = 512
MAX_EARLY_REQUESTS = 64  # between Hello and Welcome
LINGER_S = 1.0  # how long a closed client may take to read what is queued for it


class ConnectionOwner(Protocol):
    """What a connection needs from the daemon."""

    connections: set[ClientConnection]  # a connection adds and removes itself
    bad_frames: int  # counted up by connections

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """The event loop of the daemon's thread."""

    async def open_session(self, connection: ClientConnection, hello: p.Hello) -> Session:
        """Let a client in and welcome it. Raises KvkernError with the reason if it is refused."""

    def handle(self, connection: ClientConnection, session: Session, request: p.Request) -> None:
        """Carry out a request and answer it. Raises KvkernError if this client may not send it."""

    def end_session(self, session: Session) -> None:
        """The client is gone. What it held goes into quarantine or is freed."""


class ClientConnection(asyncio.Protocol):
    """The connection of one client. Runs in the event loop's thread."""

    def __init__(self, owner: ConnectionOwner) -> None:
        self._owner = owner
        self._splitter = framing.FrameSplitter()
        self._transport: asyncio.Transport | None = None
        self._opening: asyncio.Task[None] | None = None
        self._early: list[p.Request] = []  # requests sent after Hello, while the arena is being made
        self._hello_deadline: asyncio.TimerHandle | None = None
        self.peer = (0, 0, 0)  # pid, uid, gid
        self.session: Session | None = None
        self.wants_index = False  # gets the changes of the index
        self.wants_requests = False  # gets every request that ends

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Identify the peer. Refuse it if there are too many connections."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self.peer = peer_credentials(transport.get_extra_info("socket"))
        self._owner.connections.add(self)
        if len(self._owner.connections) > MAX_CONNECTIONS:
            self.refuse(f"{MAX_CONNECTIONS} connections are open already, the limit; close some, or run another daemon")
            return
        self._hello_deadline = self._owner.loop.call_later(HELLO_S, self.close, "sent no Hello")

    def data_received(self, data: bytes) -> None:
        """Carry out every request that is complete."""
        try:
            for body in self._splitter.feed(data):
                self._handle(framing.decode_request(body))
                if self._transport is None:
                    return
        except KvkernError as error:
            self._owner.bad_frames += isinstance(error, p.ProtocolError)
            self.close(str(error))

    def eof_received(self) -> None:
        """Treat a client that stops sending as gone."""
        self.close("hung up")

    def connection_lost(self, exc: Exception | None) -> None:
        """End the session."""
        self._transport = None
        self._owner.connections.discard(self)
        if self._hello_deadline is not None:
            self._hello_deadline.cancel()
        if self.session is not None:
            self._owner.end_session(self.session)
            self.session = None

    @property
    def closed(self) -> bool:
        """Return True if nothing can be sent any more."""
        return self._transport is None

    def send(self, message: p.Response) -> None:
        """Queue a message. A client that reads too slowly is disconnected."""
        self.send_frame(framing.encode(message))

    def send_frame(self, frame: bytes) -> None:
        """Queue a frame, which may be the same for many clients."""
        transport = self._transport
        if transport is None:
            return
        transport.write(frame)
        if transport.get_write_buffer_size() > MAX_UNSENT_NBYTES:
            self.close(f"left more than {format_nbytes(MAX_UNSENT_NBYTES)} of answers unread")

    def send_welcome(self, welcome: p.Welcome, descriptor: int | None) -> None:
        """Send the first answer, with the arena's descriptor beside it. It may bypass the transport: nothing is queued yet."""
        assert self._transport is not None
        frame = framing.encode(welcome)
        if descriptor is None:
            self._transport.write(frame)
            return
        with socket.socket(fileno=os.dup(self._transport.get_extra_info("socket").fileno())) as sock:
            sent = socket.send_fds(sock, [frame], [descriptor])
        self._transport.write(frame[sent:])

    def refuse(self, reason: str) -> None:
        """Send the reason, then hang up."""
        self.send(p.Refused(reason))
        self.close(f"was refused: {reason}")

    def close(self, why: str) -> None:
        """Hang up. The client has LINGER_S to read what is queued. `why` ends the log line that begins with the client."""
        if self._transport is not None:
            logger.info("kvkern: client pid %d uid %d %s", self.peer[0], self.peer[1], why)
            transport, self._transport = self._transport, None
            if transport.get_write_buffer_size() > MAX_UNSENT_NBYTES:
                transport.abort()
            else:
                transport.close()
                self._owner.loop.call_later(LINGER_S, transport.abort)

    def _handle(self, request: p.Request) -> None:
        if self.session is not None:
            self._owner.handle(self, self.session, request)
        elif self._opening is not None:
            if len(self._early) >= MAX_EARLY_REQUESTS:
                raise p.ProtocolError(
                    f"the client sent more than {MAX_EARLY_REQUESTS} requests before Welcome; wait for it"
                )
            self._early.append(request)
        elif isinstance(request, p.Hello):
            if self._hello_deadline is not None:
                self._hello_deadline.cancel()  # to make the arena may take longer
            self._opening = self._owner.loop.create_task(self._open(request))
        else:
            raise p.ProtocolError(f"the client sent {type(request).__name__} before Hello; send Hello first")

    async def _open(self, hello: p.Hello) -> None:
        done = False
        try:
            self.session = await self._owner.open_session(self, hello)
            self._handle_early()
            done = True
        except (KvkernError, OSError) as error:
            self.refuse(str(error))
        finally:
            self._opening = None  # asyncio reports a failed task as soon as nothing refers to it
            if not done:  # an unexpected error, which asyncio logs
                self.refuse("the daemon failed while it let this client in; its log says why")

    def _handle_early(self) -> None:
        early, self._early = self._early, []
        try:
            for request in early:
                if self.session is not None:
                    self._owner.handle(self, self.session, request)
        except KvkernError as error:
            self.close(str(error))
