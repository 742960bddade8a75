"""One client of the daemon: cuts its bytes into requests, queues its answers, hangs up on who breaks the rules.

A client that does not read is disconnected before its answers fill the memory.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from typing import Protocol

from ...config import format_nbytes
from ...errors import KvkernError
from .. import protocol as p
from .peer_credentials import peer_of
from .sessions import Session

logger = logging.getLogger("kvkern")

HELLO_S = 5.0  # a connection that has not said Hello by then is closed
MAX_UNSENT_NBYTES = 64 << 20  # of one client
MAX_CONNECTIONS = 512
LINGER_S = 1.0  # how long a client that is let go may take to read what is queued for it


class ConnectionOwner(Protocol):
    """What a connection needs of the daemon."""

    connections: set[ClientConnection]
    bad_frames: int

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """The loop it runs in."""

    async def open(self, connection: ClientConnection, hello: p.Hello) -> Session:
        """Let a client in. Raises KvkernError with the reason if not."""

    def handle(self, connection: ClientConnection, session: Session, request: p.Request) -> None:
        """Carry out a request and answer it. Raises KvkernError for what this client may not say."""

    def detach(self, session: Session) -> None:
        """A client is gone."""


class ClientConnection(asyncio.Protocol):
    """One client."""

    def __init__(self, server: ConnectionOwner) -> None:
        self._server = server
        self._frames = p.Frames()
        self._transport: asyncio.Transport | None = None
        self._opening: asyncio.Task[None] | None = None
        self._early: list[p.Request] = []  # after Hello, while the arena is being made
        self._deadline: asyncio.TimerHandle | None = None
        self.peer = (0, 0, 0)  # pid, uid, gid
        self.session: Session | None = None
        self.index = False  # is told what becomes of the index
        self.recording = False  # is told of every request that ends

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Look who it is."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self.peer = peer_of(transport.get_extra_info("socket"))
        self._server.connections.add(self)
        if len(self._server.connections) > MAX_CONNECTIONS:
            self.refuse(f"{MAX_CONNECTIONS} connections are open already; close some, or run another daemon")
            return
        self._deadline = self._server.loop.call_later(HELLO_S, self.close, "said no Hello")

    def data_received(self, data: bytes) -> None:
        """Carry out every request that is whole."""
        try:
            for body in self._frames.feed(data):
                self._handle(p.decode_request(body))
                if self._transport is None:
                    return
        except KvkernError as error:
            self._server.bad_frames += isinstance(error, p.ProtocolError)
            self.close(str(error))

    def eof_received(self) -> None:
        """A client that sends no more is gone."""
        self.close("has ended")

    def connection_lost(self, exc: Exception | None) -> None:
        """End the session."""
        self._transport = None
        self._server.connections.discard(self)
        if self._deadline is not None:
            self._deadline.cancel()
        if self.session is not None:
            self._server.detach(self.session)
            self.session = None

    @property
    def gone(self) -> bool:
        """Whether nothing can be sent any more."""
        return self._transport is None

    def send(self, message: p.Response) -> None:
        """Queue an answer; a client that reads too slowly is disconnected."""
        self.send_frame(p.encode(message))

    def send_frame(self, frame: bytes) -> None:
        """Queue a message that is encoded already, for many clients perhaps."""
        transport = self._transport
        if transport is None:
            return
        transport.write(frame)
        if transport.get_write_buffer_size() > MAX_UNSENT_NBYTES:
            self.close(f"has {format_nbytes(MAX_UNSENT_NBYTES)} of answers unread")

    def send_welcome(self, welcome: p.Welcome, descriptor: int | None) -> None:
        """First answer: nothing is queued yet, so it can go past the transport, with the descriptor beside it."""
        assert self._transport is not None
        frame = p.encode(welcome)
        if descriptor is None:
            self._transport.write(frame)
            return
        with socket.socket(fileno=os.dup(self._transport.get_extra_info("socket").fileno())) as sock:
            sent = socket.send_fds(sock, [frame], [descriptor])
        self._transport.write(frame[sent:])

    def refuse(self, reason: str) -> None:
        """Say why, then hang up."""
        self.send(p.Refused(reason))
        self.close(f"was refused: {reason}")

    def close(self, why: str) -> None:
        """Hang up, after what is queued if the client reads it within LINGER_S."""
        if self._transport is not None:
            logger.info("kvkern: client pid %d uid %d %s", self.peer[0], self.peer[1], why)
            transport, self._transport = self._transport, None
            if transport.get_write_buffer_size() > MAX_UNSENT_NBYTES:
                transport.abort()
            else:
                transport.close()
                self._server.loop.call_later(LINGER_S, transport.abort)

    def _handle(self, request: p.Request) -> None:
        if self.session is not None:
            self._server.handle(self, self.session, request)
        elif self._opening is not None:
            if len(self._early) >= 64:
                raise p.ProtocolError("sends requests before it was welcomed")
            self._early.append(request)
        elif isinstance(request, p.Hello):
            if self._deadline is not None:
                self._deadline.cancel()  # the arena may take longer
            self._opening = self._server.loop.create_task(self._open(request))
        else:
            raise p.ProtocolError(f"says {type(request).__name__} before Hello")

    async def _open(self, hello: p.Hello) -> None:
        done = False
        try:
            self.session = await self._server.open(self, hello)
            self._handle_early()
            done = True
        except (KvkernError, OSError) as error:
            self.refuse(str(error))
        finally:
            self._opening = None  # so that nothing keeps a task that has failed, and asyncio reports it now
            if not done:
                self.close("could not be let in")

    def _handle_early(self) -> None:
        early, self._early = self._early, []
        try:
            for request in early:
                if self.session is not None:
                    self._server.handle(self, self.session, request)
        except KvkernError as error:
            self.close(str(error))
