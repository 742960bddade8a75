"""One client's connection to the daemon: cuts its bytes into requests and queues its answers.

It hangs up on a client that breaks the protocol, that does not end what it began to say, or whose unread answers would fill
the memory. While a client leaves answers unread, or has more requests waiting than one turn carries out, nothing more is
read from it: its own socket fills, and it waits.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import socket
import time
from typing import Protocol

from ...bounded_dict import BoundedDict
from ...config import format_nbytes
from ...errors import KvkernError
from .. import framing
from .. import protocol as p
from ..peer_credentials import Peer
from .admission import Admission
from .fair_turns import FairTurns
from .sessions import MAX_NAMESPACES, Session

logger = logging.getLogger("kvkern")

HELLO_S = 5.0  # a connection that has not sent Hello by then is closed
MAX_OPENING_S = 0.01  # what a client is charged at most for being let in
REQUEST_S = 10.0  # how long a request may take to arrive, from its first byte to its last
STALLED_S = 30.0  # a client that has not read a byte of its waiting answers for so long is gone
MAX_HELLO_NBYTES = 4096  # of the first frame
MAX_EARLY_NBYTES = 1 << 16  # of requests that arrive while the session is being opened, above which no more is read
MAX_WAITING_NBYTES = (
    1 << 20
)  # answers queued for one client, above which its requests wait until it has read most of them
MAX_UNSENT_NBYTES = 64 << 20  # answers and news queued for one client
LINGER_S = 1.0  # how long a closed client may take to read what is queued for it

_serial = itertools.count(1)


class ConnectionOwner(Protocol):
    """What a connection needs from the daemon."""

    connections: set[ClientConnection]  # a connection adds and removes itself
    admission: Admission
    turns: FairTurns
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

    def __init__(
        self,
        owner: ConnectionOwner,
        peer: Peer,
        start: int,  # start time of its process; 0: the process cannot be seen
    ) -> None:
        self.peer, self.process = peer, (peer.pid, start)
        self.turns_end_s = owner.turns.begin(peer.pid)
        self.queued = False
        self.session: Session | None = None
        self.wants_index = False  # gets the changes of the index
        self.wants_requests = False  # gets every request that ends
        self.described: BoundedDict[bytes, None] = BoundedDict(MAX_NAMESPACES)  # namespaces that it has described
        self.unread_since = 0
        self.operator = owner.admission.is_operator(peer)
        self._owner = owner
        self._splitter = framing.FrameSplitter(MAX_HELLO_NBYTES)
        self._transport: asyncio.Transport | None = None
        self._opening: asyncio.Task[None] | None = None
        self._hello_deadline: asyncio.TimerHandle | None = None
        self._counted_nbytes = 0  # of the splitter, as the owner's admission knows
        self._answers_wait = False  # until the client has read most of them
        self._queued_nbytes = 0  # of all answers so far
        self._requests = 0  # so far
        self._seen = (0, 0)  # requests, and bytes that the client has read, at the last look
        self._half_s = self._stalled_s = 0.0  # for how long a request is incomplete, and no answer has been read
        owner.connections.add(self)
        owner.admission.enter(peer)

    # -- what asyncio calls --------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Wait for Hello."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        transport.set_write_buffer_limits(MAX_WAITING_NBYTES)
        self._hello_deadline = self._owner.loop.call_later(HELLO_S, self._close_without_hello)

    def data_received(self, data: bytes) -> None:
        """Carry out what is complete, now or in a later turn."""
        if not self._splitter:
            self.unread_since = next(_serial)
        self._splitter.append(data)
        self._ask_for_turn()

    def pause_writing(self) -> None:
        """The client does not read. Its requests wait until it does."""
        self._answers_wait = True

    def resume_writing(self) -> None:
        """The client has read its answers. Go on with its requests."""
        self._answers_wait = False
        self._ask_for_turn()

    def eof_received(self) -> None:
        """Treat a client that stops sending as gone."""
        self.close("hung up")

    def connection_lost(self, exc: Exception | None) -> None:
        """End the session."""
        began_s, self._transport = time.perf_counter(), None
        self._forget_unread()
        if self._hello_deadline is not None:
            self._hello_deadline.cancel()
        try:
            if self.session is not None:
                self._owner.end_session(self.session)
                self.session = None
        finally:
            if self in self._owner.connections:
                self._owner.connections.discard(self)
                self._owner.admission.leave(self.peer)
                self._owner.turns.charge(self, time.perf_counter() - began_s)
                self._owner.turns.end(self.peer.pid, self.turns_end_s)

    # -- what the daemon calls -----------------------------------------------------------------------------------------

    @property
    def closed(self) -> bool:
        """Return True if nothing can be sent any more."""
        return self._transport is None

    @property
    def unread_nbytes(self) -> int:
        """Bytes of requests that have arrived and are not carried out yet."""
        return len(self._splitter)

    @property
    def unsent_nbytes(self) -> int:
        """Bytes of answers that wait because the client does not read."""
        return self._transport.get_write_buffer_size() if self._transport is not None else 0

    def work(self, until_s: float) -> bool:
        """Carry out at least one request, and more until this time. Return True if more can be carried out now."""
        try:
            return self._carry_out(until_s)
        except KvkernError as error:
            self._owner.bad_frames += isinstance(error, p.ProtocolError)
            self.close(str(error))
            return False
        except BaseException:  # asyncio logs it
            self.close("was disconnected by a fault of the daemon; the log says which")
            raise
        finally:
            self._after_work()

    def watch(self, elapsed_s: float) -> None:
        """Hang up if the client does not end a request, or does not read. Call it regularly.

        `elapsed_s` is the time between two calls as planned: when all processes were suspended, nobody is late.
        """
        unsent = self.unsent_nbytes
        seen = self._requests, self._queued_nbytes - unsent
        half = self._may_work() and bool(self._splitter) and not self._splitter.complete and seen[0] == self._seen[0]
        self._half_s = self._half_s + elapsed_s if half else 0.0
        self._stalled_s = self._stalled_s + elapsed_s if unsent and seen[1] == self._seen[1] else 0.0
        self._seen = seen
        if self._half_s > REQUEST_S:
            self.close(f"did not end a request within {REQUEST_S:g} s")
        elif self._stalled_s > STALLED_S:
            self.close(f"read no answer for {STALLED_S:g} s")

    def send(self, message: p.Response) -> None:
        """Queue a message. A client that reads too slowly is disconnected."""
        self.send_frame(framing.encode(message))

    def send_frame(self, frame: bytes) -> None:
        """Queue a frame, which may be the same for many clients."""
        transport = self._transport
        if transport is None:
            return
        self._queued_nbytes += len(frame)
        transport.write(frame)
        if transport.get_write_buffer_size() > MAX_UNSENT_NBYTES:
            self.close(f"left more than {format_nbytes(MAX_UNSENT_NBYTES)} of answers unread")

    def send_welcome(self, welcome: p.Welcome, descriptor: int | None) -> None:
        """Send the first answer, with the arena's descriptor beside it. It may bypass the transport: nothing is queued yet."""
        assert self._transport is not None
        frame = framing.encode(welcome)
        if descriptor is None:
            self.send_frame(frame)
            return
        with socket.socket(fileno=os.dup(self._transport.get_extra_info("socket").fileno())) as sock:
            sent = socket.send_fds(sock, [frame], [descriptor])
        self.send_frame(frame[sent:])

    def refuse(self, reason: str) -> None:
        """Send the reason, then hang up."""
        self.send(p.Refused(reason))
        self.close(f"was refused: {reason}")

    def close(self, why: str) -> None:
        """Hang up. The client has LINGER_S to read what is queued. `why` ends the log line that begins with the client."""
        if self._transport is not None:
            logger.info(
                "kvkern: client pid %(pid)d uid %(uid)d %(why)s",
                {"event": "client_left", "pid": self.peer.pid, "uid": self.peer.uid, "why": why},
            )
            transport, self._transport = self._transport, None
            self._forget_unread()
            if transport.get_write_buffer_size() > MAX_UNSENT_NBYTES:
                transport.abort()
            else:
                transport.close()
                self._owner.loop.call_later(LINGER_S, transport.abort)

    # -- requests ------------------------------------------------------------------------------------------------------

    def _ask_for_turn(self) -> None:
        self._owner.turns.ask(self)
        if self.queued:  # else `work` has done it
            self._after_work()

    def _may_work(self) -> bool:
        return self._transport is not None and self._opening is None and not self._answers_wait

    def _carry_out(self, until_s: float) -> bool:
        while self._may_work() and (body := self._splitter.pop()) is not None:
            self._requests += 1
            self._handle(framing.decode_request(body))
            if time.perf_counter() >= until_s:
                break
        return self._may_work() and self._splitter.complete

    def _after_work(self) -> None:
        """Read on if everything that can be carried out has been. Count what is left."""
        if self._transport is None:
            return
        early = (
            self._opening is not None and len(self._splitter) < MAX_EARLY_NBYTES
        )  # else its end would not be noticed
        if early or (self._may_work() and not self.queued and not self._splitter.complete):
            self._transport.resume_reading()
        else:
            self._transport.pause_reading()
        nbytes = len(self._splitter)
        if nbytes != self._counted_nbytes:
            more, self._counted_nbytes = nbytes - self._counted_nbytes, nbytes
            self._owner.admission.count_unread(self.peer, more, self._owner.connections)

    def _forget_unread(self) -> None:
        self._splitter.clear()
        less, self._counted_nbytes = -self._counted_nbytes, 0
        if less:
            self._owner.admission.count_unread(self.peer, less, ())

    def _handle(self, request: p.Request) -> None:
        if self.session is not None:
            self._owner.handle(self, self.session, request)
        elif isinstance(request, p.Hello):
            if self._hello_deadline is not None:
                self._hello_deadline.cancel()  # to make the arena may take longer
            self._splitter.max_nbytes = framing.MAX_FRAME_NBYTES
            self._opening = self._owner.loop.create_task(self._open(request))
        else:
            raise p.ProtocolError(f"the client sent {type(request).__name__} before Hello; send Hello first")

    def _close_without_hello(self) -> None:
        if not self._splitter.complete:  # else Hello is there and waits for a turn
            self.close("sent no Hello")

    async def _open(self, hello: p.Hello) -> None:
        """Open the session. Requests that arrive meanwhile wait."""
        done, began_s = False, time.perf_counter()
        try:
            self.session = await self._owner.open_session(self, hello)
            done = True
        except (KvkernError, OSError) as error:
            self.refuse(str(error))
        finally:
            # The time to make the arena is not the thread's, so not all of it counts.
            self._owner.turns.charge(self, min(time.perf_counter() - began_s, MAX_OPENING_S))
            self._opening = None  # asyncio reports a failed task as soon as nothing refers to it
            if not done:  # an unexpected error, which asyncio logs
                self.refuse("the daemon failed while it let this client in; its log says why")
        if done:
            self._ask_for_turn()
