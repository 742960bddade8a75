"""A connection to the daemon that outlives daemons: one thread that reads, writes and connects again. Knows no cache.

Callers put requests into an outbox and go on; responses reach their callbacks in the thread, under the lock that the
callers share. A daemon that leaves a request unanswered for ANSWER_S is taken for gone.
"""

from __future__ import annotations

import array
import fcntl
import logging
import os
import random
import selectors
import socket
import struct
import termios
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

from ...arena.file import Arena, ArenaSpec, attach_descriptor
from ...errors import ArenaError, ConfigError, KvkernError
from .. import protocol as p

logger = logging.getLogger("kvkern")

ANSWER_S = 2.0
CONNECT_S = 5.0
BACKOFF_S = (0.05, 2.0)
MAX_UNSENT_NBYTES = 16 << 20
_DESCRIPTOR = struct.Struct("i")

Answered = Callable[[p.Response | None], None]  # called once, under the lock; None: no answer will come


class ReconnectingLink:
    """Thread-safe. `connect` until it succeeds, then `start`; `close` ends it. Methods marked (locked) need the lock."""

    def __init__(
        self,
        path: Path,
        hello: p.Hello,
        opened: Callable[[], None],  # (locked) a connection is there: say what must be said first
        lost: Callable[[], None],  # (locked) it is gone
        told: Callable[[p.Response], None],  # (locked) what answers no request
    ) -> None:
        self.path = path
        self.lock = threading.Condition()
        self.connected = False
        self.arena: Arena | None = None  # from the first connection on, always the same
        self._hello = hello
        self._opened, self._on_lost, self._told = opened, lost, told
        self._socket: socket.socket | None = None
        self._frames = p.Frames()
        self._outbox: deque[bytes] = deque()
        self._unsent = 0
        self._waiting: dict[int, tuple[float, Answered]] = {}
        self.remote = False  # whether the daemon may have what its index does not tell
        self._next_id = 0
        self._reading = self._closing = False
        self._wake_in, self._wake_out = socket.socketpair()
        self._wake_in.setblocking(False)
        self._wake_out.setblocking(False)
        self._thread = threading.Thread(target=self._run, name="kvkern-node", daemon=True)

    def start(self) -> None:
        """Run the thread. After the first `connect`."""
        self._thread.start()

    def close(self) -> None:
        """Send what is in the outbox if the daemon takes it, and end."""
        self._closing = True
        self._wake()
        if self._thread.is_alive():
            self._thread.join(timeout=CONNECT_S + 1)
        else:
            self._hang_up()
        self._wake_in.close()
        self._wake_out.close()
        if self.arena is not None:
            self.arena.close()

    def send(self, message: p.Request) -> None:
        """(locked) Queue a request that is not answered; nothing if the daemon is away."""
        if self.connected:
            frame = p.encode(message)
            self._outbox.append(frame)
            self._unsent += len(frame)
            self._wake()

    def ask(self, make: Callable[[int], p.Request], answered: Answered) -> None:
        """(locked) Queue a request made with its id. Raises KvkernError, and asks nothing, if it is no message."""
        if not self.connected:
            answered(None)
            return
        self._next_id += 1
        self.send(make(self._next_id))
        self._waiting[self._next_id] = (time.monotonic() + ANSWER_S, answered)

    def behind(self) -> bool:
        """(locked) Whether the daemon has said something that nobody has been told yet."""
        if self._socket is None:
            return False
        unread = array.array("i", [0])
        fcntl.ioctl(self._socket.fileno(), termios.FIONREAD, unread)
        # In this order: what the thread has taken from the socket before the look at it, `_reading` tells.
        return unread[0] > 0 or self._reading or bool(self._frames)

    def connect(self, prefault: bool, welcome_s: float = CONNECT_S) -> None:
        """One attempt. The first engine of an arena waits until its pages are there.

        Raises OSError, or KvkernError if the daemon refuses or has another arena than before.
        """
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            sock.settimeout(CONNECT_S)
            sock.connect(str(self.path))
            sock.settimeout(welcome_s)
            sock.sendall(p.encode(self._hello))
            frames = p.Frames()
            welcome, descriptor, rest = _receive_welcome(sock, frames)
            self._keep_arena(_attach(welcome, descriptor, prefault and self.arena is None))
            sock.setblocking(False)
        except BaseException:
            sock.close()
            raise
        with self.lock:
            self._socket, self._frames, self.connected, self.remote = sock, frames, True, welcome.remote
            self._opened()
            for body in rest:
                self._apply(p.decode_response(body))

    def _keep_arena(self, arena: Arena) -> None:
        if self.arena is None:
            self.arena = arena
            return
        same = arena.file_id() == self.arena.file_id()
        arena.close()
        if not same:
            raise ArenaError(f"the daemon on {self.path} has a new arena; restart this engine to use it again")

    # -- the thread ------------------------------------------------------------------------------------------------------

    def _wake(self) -> None:
        try:
            self._wake_out.send(b"x")
        except OSError:
            return  # full: it has been woken often enough; or closed

    def _run(self) -> None:
        try:
            self._stay_connected()
        finally:  # whatever ended this thread: nobody waits for an answer that cannot come
            self._hang_up()

    def _stay_connected(self) -> None:
        delay, said, since = BACKOFF_S[0], "", time.monotonic()
        while not self._closing:
            try:
                if self._socket is None:
                    self.connect(prefault=False)
                    logger.warning("kvkern: the daemon on %s is back", self.path)
                    since = time.monotonic()
                self._serve()
            except (OSError, KvkernError) as error:
                if self.connected and time.monotonic() - since > BACKOFF_S[1]:
                    delay, said = BACKOFF_S[0], ""  # it was there for a while
                if self.connected and not self._closing:
                    logger.warning("kvkern: lost the daemon on %s (%s); everything is computed now", self.path, error)
                elif isinstance(error, KvkernError) and str(error) != said:
                    said = str(error)
                    logger.warning("kvkern: %s", said)
                self._hang_up()
                self._pause(delay * (0.5 + random.random()))
                delay = min(2 * delay, BACKOFF_S[1])

    def _pause(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not self._closing and (left := deadline - time.monotonic()) > 0:
            time.sleep(min(left, 0.05))

    def _serve(self) -> None:
        """Read and write until the client closes. Raises OSError or ProtocolError when the connection ends before."""
        sock = self._socket
        assert sock is not None
        with selectors.DefaultSelector() as selector:
            selector.register(sock, selectors.EVENT_READ)
            selector.register(self._wake_in, selectors.EVENT_READ)
            while True:
                with self.lock:
                    self._flush(sock)
                    events = selectors.EVENT_READ | (selectors.EVENT_WRITE if self._outbox else 0)
                    if self._closing:
                        return
                    if any(deadline < time.monotonic() for deadline, _ in self._waiting.values()):
                        raise TimeoutError(f"no answer for {ANSWER_S:.0f} s")
                    timeout_s = ANSWER_S / 8 if self._waiting else None
                selector.modify(sock, events)
                for key, mask in selector.select(timeout_s):
                    if key.fileobj is self._wake_in:
                        self._wake_in.recv(4096)
                    elif mask & selectors.EVENT_READ:
                        self._read(sock)

    def _flush(self, sock: socket.socket) -> None:
        while self._outbox:
            try:
                sent = sock.send(self._outbox[0])
            except BlockingIOError:
                if self._unsent > MAX_UNSENT_NBYTES:
                    raise TimeoutError(f"it leaves {self._unsent} bytes unread") from None
                return
            self._unsent -= sent
            if sent < len(self._outbox[0]):
                self._outbox[0] = self._outbox[0][sent:]
            else:
                self._outbox.popleft()

    def _read(self, sock: socket.socket) -> None:
        self._reading = True
        try:
            data = sock.recv(1 << 20)
            if not data:
                raise ConnectionError("it has ended")
            for body in self._frames.feed(data):
                response = p.decode_response(body)
                with self.lock:
                    self._apply(response)
                    self.lock.notify_all()
        finally:
            self._reading = False

    def _apply(self, response: p.Response) -> None:
        if isinstance(response, p.Changed | p.Described):
            self._told(response)
        elif isinstance(response, p.Draining):
            logger.info("kvkern: the daemon on %s is ending; until it is back everything is computed", self.path)
            self._told(response)
        elif isinstance(response, p.Welcome | p.Refused | p.Recorded):
            raise p.ProtocolError(f"{type(response).__name__} in an engine's open session")
        elif isinstance(response, p.Working):
            if (waiting := self._waiting.get(response.id)) is not None:
                self._waiting[response.id] = (time.monotonic() + ANSWER_S, waiting[1])
        elif (entry := self._waiting.pop(response.id, None)) is not None:
            entry[1](response)
        elif isinstance(response, p.Granted):
            self._told(response)

    def _hang_up(self) -> None:
        with self.lock:
            if self._socket is not None:
                self._socket.close()
            self._socket = None
            self.connected = False
            self._outbox.clear()
            self._unsent = 0
            waiting, self._waiting = self._waiting, {}
            for _, answered in waiting.values():
                answered(None)
            self._on_lost()
            self.lock.notify_all()


def _receive_welcome(sock: socket.socket, frames: p.Frames) -> tuple[p.Welcome, int, list[bytes]]:
    """(welcome, the arena's descriptor, frames that came with it). Raises OSError, or ConfigError if the daemon refuses."""
    descriptor = -1
    bodies: list[bytes] = []
    try:
        while not bodies:
            # not recv_fds, which ignores its flags: a process that the engine starts must not inherit the arena
            data, beside, _flags, _address = sock.recvmsg(
                1 << 16, socket.CMSG_LEN(_DESCRIPTOR.size), socket.MSG_CMSG_CLOEXEC
            )
            for level, kind, raw in beside:
                if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS) and len(raw) == _DESCRIPTOR.size:
                    (descriptor,) = _DESCRIPTOR.unpack(raw)
            if not data:
                raise ConnectionError("the daemon hung up")
            bodies += list(frames.feed(data))
        first = p.decode_response(bodies[0])
        if isinstance(first, p.Refused):
            raise ConfigError(f"the daemon refuses: {first.reason}")
        if not isinstance(first, p.Welcome) or first.geometry is None or descriptor < 0:
            raise p.ProtocolError(f"the daemon answers Hello with {type(first).__name__} and no arena")
    except BaseException:
        if descriptor >= 0:
            os.close(descriptor)
        raise
    return first, descriptor, bodies[1:]


def _attach(welcome: p.Welcome, descriptor: int, prefault: bool) -> Arena:
    found = welcome.geometry
    assert found is not None
    return attach_descriptor(descriptor, ArenaSpec(found.slots(), welcome.num_slots), Path(welcome.path), prefault)
