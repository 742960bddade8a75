"""A link to the daemon that survives the daemon's restarts: one thread reads, writes and connects again. Knows no cache.

Callers put requests into an outbox and go on. Responses reach their callbacks in the link's thread, under the lock that
the callers share. If the daemon leaves a request unanswered for ANSWER_S, the link treats the daemon as gone.
"""

from __future__ import annotations

import array
import contextlib
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
from .. import framing
from .. import protocol as p
from .daemon_identity import check_arena, check_daemon

logger = logging.getLogger("kvkern")

ANSWER_S = 2.0  # how long the daemon may take to answer
CONNECT_S = 5.0
BACKOFF_S = (0.05, 2.0)  # the first and the longest pause between attempts to connect
MAX_UNSENT_NBYTES = 16 << 20
_DESCRIPTOR = struct.Struct("i")

OnAnswer = Callable[[p.Response | None], None]  # called once, under the lock; None: no answer will come


class RefusedForNow(ConfigError):
    """The daemon lets this client not in, for a reason that may pass: it is of another version, is ending, or is full."""


class ReconnectingLink:
    """Thread-safe. Call `connect` until it succeeds or you give up, then `start`; `close` ends it.

    Call (locked) methods with `lock` held.
    """

    def __init__(
        self,
        path: Path,
        hello: p.Hello,
        on_connected: Callable[[], None],  # (locked) sends what must be sent first on a new connection
        on_disconnected: Callable[[], None],  # (locked) the connection is gone
        on_message: Callable[[p.Response], None],  # (locked) a message that answers no request
        daemon_uid: int = -1,  # a user that may serve, beside root and this process's own; negative: none
    ) -> None:
        self.path = path
        self.daemon_uid = daemon_uid
        self.dump_arena = False  # core dumps of this process hold the arena; set it before `connect`
        self.prefault = (
            False  # touch the arena's pages, if the thread makes the first connection; set it before `start`
        )
        self.lock = threading.Condition()
        self.connected = False
        self.arena: Arena | None = None  # set by the first connection, and never replaced
        self._hello = hello
        self._on_connected, self._on_disconnected, self._on_message = on_connected, on_disconnected, on_message
        self._socket: socket.socket | None = None
        self._splitter = framing.FrameSplitter()
        self._outbox: deque[bytes] = deque()
        self._unsent_nbytes = 0
        self._waiting: dict[int, tuple[float, OnAnswer]] = {}  # request id -> (monotonic deadline, callback)
        self.remote = False  # the daemon has a remote store: it may find more chunks than its index holds
        self._next_id = 0
        self._reading = self._closing = False
        self._wake_in, self._wake_out = socket.socketpair()
        self._wake_in.setblocking(False)
        self._wake_out.setblocking(False)
        self._thread = threading.Thread(target=self._run, name="kvkern-node", daemon=True)

    def start(self) -> None:
        """Start the thread, which connects as often as it must. Call it once."""
        self._thread.start()

    @property
    def closing(self) -> bool:
        """Return True once `close` was called."""
        return self._closing

    def close(self) -> None:
        """Send what is in the outbox, as far as the daemon accepts it at once, and end the thread. Unmaps the arena."""
        self._closing = True
        self._wake()
        if self._thread.is_alive():
            self._thread.join(timeout=CONNECT_S + 1)
        else:
            self._disconnect()
        self._wake_in.close()
        self._wake_out.close()
        if self.arena is not None:
            self.arena.close()

    def send(self, message: p.Request) -> None:
        """(locked) Queue a request that gets no answer. Does nothing while the daemon is away."""
        if self.connected:
            frame = framing.encode(message)
            self._outbox.append(frame)
            self._unsent_nbytes += len(frame)
            self._wake()

    def ask(self, make_request: Callable[[int], p.Request], on_answer: OnAnswer) -> None:
        """(locked) Queue the request that `make_request` makes of a new id. `on_answer` gets the answer.

        Raises KvkernError, and queues nothing, if the request cannot be encoded.
        """
        if not self.connected:
            on_answer(None)
            return
        self._next_id += 1
        self.send(make_request(self._next_id))
        self._waiting[self._next_id] = (time.monotonic() + ANSWER_S, on_answer)

    def has_unread(self) -> bool:
        """(locked) Return True if the daemon has sent something that no callback has received yet."""
        if self._socket is None:
            return False
        unread = array.array("i", [0])
        fcntl.ioctl(self._socket.fileno(), termios.FIONREAD, unread)
        # The socket is examined first: bytes that the thread has taken from it before that show in `_reading` or the splitter.
        return unread[0] > 0 or self._reading or bool(self._splitter)

    def connect(self, prefault: bool, welcome_s: float = CONNECT_S) -> None:
        """Try once to connect. The first engine of an arena waits at most `welcome_s` until the arena is made.

        Raises OSError, or KvkernError if the daemon refuses, is another user's, or has another arena than before.
        """
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            sock.settimeout(CONNECT_S)
            sock.connect(str(self.path))
            serving_uid = check_daemon(sock, self.path, self.daemon_uid)
            sock.settimeout(welcome_s)
            send_hello(sock, self._hello)
            splitter = framing.FrameSplitter()
            welcome, descriptor, rest = _receive_welcome(sock, splitter)
            prefault = prefault and self.arena is None
            self._keep_arena(_attach_arena(welcome, descriptor, serving_uid, prefault, self.dump_arena))
            sock.setblocking(False)
        except BaseException:
            sock.close()
            raise
        with self.lock:
            self._socket, self._splitter, self.connected, self.remote = sock, splitter, True, welcome.remote
            self._on_connected()
            try:
                for body in rest:
                    self._dispatch(framing.decode_response(body))
            except KvkernError:
                self._disconnect()
                raise
            self.lock.notify_all()

    def _keep_arena(self, arena: Arena) -> None:
        """Keep the first arena. Raises ArenaError if a later one is another file."""
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
            return  # the pipe is full, so the thread will wake up anyway; or it is closed

    def _run(self) -> None:
        try:
            self._stay_connected()
        finally:  # however the thread ends, no caller may wait for an answer that cannot come
            self._disconnect()

    def _stay_connected(self) -> None:
        delay, last_warning, since = BACKOFF_S[0], "", time.monotonic()
        while not self._closing:
            try:
                if self._socket is None:
                    first = self.arena is None
                    self.connect(self.prefault)
                    logger.warning(
                        "kvkern: connected to the daemon on %(socket)s" + ("" if first else " again"),
                        {"event": "daemon_found" if first else "daemon_back", "socket": self.path},
                    )
                    since = time.monotonic()
                self._exchange()
            except (OSError, KvkernError) as error:
                if self.connected and time.monotonic() - since > BACKOFF_S[1]:
                    delay, last_warning = BACKOFF_S[0], ""  # the connection held for a while: begin anew
                if self.connected and not self._closing:
                    logger.warning(
                        "kvkern: lost the daemon on %(socket)s: %(error)s. Every lookup is a miss until it is back. "
                        "If it stays away, see its log and start `kvkern serve` again",
                        {"event": "daemon_lost", "socket": self.path, "error": error},
                    )
                elif isinstance(error, KvkernError) and str(error) != last_warning:
                    last_warning = str(error)
                    logger.warning("kvkern: %(error)s", {"event": "daemon_refuses", "error": last_warning})
                self._disconnect()
                self._pause(delay * (0.5 + random.random()))
                delay = min(2 * delay, BACKOFF_S[1])

    def _pause(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not self._closing and (left := deadline - time.monotonic()) > 0:
            time.sleep(min(left, 0.05))

    def _exchange(self) -> None:
        """Read and write until the client closes. Raises OSError or ProtocolError if the connection ends earlier."""
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
                        raise TimeoutError(f"the daemon has not answered for {ANSWER_S:.0f} s")
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
                if self._unsent_nbytes > MAX_UNSENT_NBYTES:
                    raise TimeoutError(
                        f"the daemon leaves {self._unsent_nbytes} bytes unread; the limit is {MAX_UNSENT_NBYTES}"
                    ) from None
                return
            self._unsent_nbytes -= sent
            if sent < len(self._outbox[0]):
                self._outbox[0] = self._outbox[0][sent:]
            else:
                self._outbox.popleft()

    def _read(self, sock: socket.socket) -> None:
        self._reading = True
        try:
            data = sock.recv(1 << 20)
            if not data:
                raise ConnectionError("the daemon hung up")
            for body in self._splitter.feed(data):
                response = framing.decode_response(body)
                with self.lock:
                    self._dispatch(response)
                    self.lock.notify_all()
        finally:
            self._reading = False

    def _dispatch(self, response: p.Response) -> None:
        """(locked) Hand a message to the callback that waits for it, or to `on_message`."""
        if isinstance(response, p.Changed | p.Described):
            self._on_message(response)
        elif isinstance(response, p.Draining):
            logger.info(
                "kvkern: the daemon on %(socket)s is ending. Every lookup is a miss until `kvkern serve` runs there again",
                {"event": "daemon_ends", "socket": self.path},
            )
            self._on_message(response)
        elif isinstance(response, p.Refused):
            raise ConfigError(f"the daemon on {self.path} refuses: {response.reason}")
        elif isinstance(response, p.Welcome | p.Recorded):
            raise p.ProtocolError(
                f"the daemon on {self.path} sent {type(response).__name__} in an engine's open session; "
                f"use the same version of kvkern on both sides"
            )
        elif isinstance(response, p.Working):
            if (waiting := self._waiting.get(response.id)) is not None:
                self._waiting[response.id] = (time.monotonic() + ANSWER_S, waiting[1])
        elif (entry := self._waiting.pop(response.id, None)) is not None:
            entry[1](response)
        elif isinstance(response, p.Granted):
            self._on_message(response)

    def _disconnect(self) -> None:
        """Close the socket. Every request that waits is answered with None."""
        with self.lock:
            if self._socket is not None:
                self._socket.close()
            self._socket = None
            self.connected = False
            self._outbox.clear()
            self._unsent_nbytes = 0
            waiting, self._waiting = self._waiting, {}
            for _, on_answer in waiting.values():
                on_answer(None)
            self._on_disconnected()
            self.lock.notify_all()


def _receive_welcome(sock: socket.socket, splitter: framing.FrameSplitter) -> tuple[p.Welcome, int, list[bytes]]:
    """Return (welcome, the arena's descriptor, bodies of the frames that arrived with it).

    The caller owns the descriptor. Raises OSError, ConfigError if the daemon refuses, or ProtocolError.
    """
    descriptor = -1
    bodies: list[bytes] = []
    try:
        while not bodies:
            # Not recv_fds, because it ignores its flags: a process that the engine starts must not inherit the arena.
            data, ancillary, _flags, _address = sock.recvmsg(
                1 << 16, socket.CMSG_LEN(_DESCRIPTOR.size), socket.MSG_CMSG_CLOEXEC
            )
            for level, kind, raw in ancillary:
                if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS) and len(raw) == _DESCRIPTOR.size:
                    (descriptor,) = _DESCRIPTOR.unpack(raw)
            if not data:
                raise ConnectionError("the daemon hung up")
            bodies += list(splitter.feed(data))
        first = framing.decode_response(bodies[0])
        if isinstance(first, p.Refused):
            if first.stays:
                raise ConfigError(f"the daemon refuses: {first.reason}")
            raise RefusedForNow(f"the daemon refuses: {first.reason}")
        if not isinstance(first, p.Welcome) or first.geometry is None or descriptor < 0:
            raise p.ProtocolError(
                f"the daemon answers Hello with {type(first).__name__} and no arena; "
                f"use the same version of kvkern on both sides"
            )
    except BaseException:
        if descriptor >= 0:
            os.close(descriptor)
        raise
    return first, descriptor, bodies[1:]


def send_hello(sock: socket.socket, hello: p.Hello) -> None:
    """Send the first message. A daemon that refuses this user does not wait for it, and its reason is there to be read."""
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        sock.sendall(framing.encode(hello))


def _attach_arena(welcome: p.Welcome, descriptor: int, serving_uid: int, prefault: bool, dump: bool) -> Arena:
    """Map the arena. Takes over the descriptor."""
    geometry = welcome.geometry
    assert geometry is not None
    try:
        check_arena(descriptor, Path(welcome.path), serving_uid)
    except BaseException:
        os.close(descriptor)
        raise
    spec = ArenaSpec(geometry.to_slots(), welcome.num_slots)
    return attach_descriptor(descriptor, spec, Path(welcome.path), prefault, dump)
