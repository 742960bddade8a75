"""The connections of one HTTP port: accepts them, bounds their number, and watches their deadlines. Reads nothing.

    at most MAX_CONNECTIONS at a time, of them MAX_OF_ADDRESS of one remote address
    no room    the one that has been without a request for longest is closed; a new one is refused only if all are busy
    in a storm at most ACCEPTED_AT_ONCE every ACCEPT_GAP_S, so that the daemon's engines notice little

So connections that send nothing keep nobody out, and a probe that only connects costs an accept.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import socket
from collections import Counter

from uvicorn.config import Config
from uvicorn.server import ServerState

from .endpoint import MAX_CONNECTIONS
from .http_connection import HttpConnection
from .pacer import Pacer

logger = logging.getLogger("kvkern")

MAX_OF_ADDRESS = 48
ACCEPTED_AT_ONCE = 4
ACCEPT_GAP_S = 0.01
PAUSE_S = 1.0  # when the system has no room for another open file
WATCH_S = 1.0
_FULL = b"HTTP/1.1 503 Service Unavailable\r\nConnection: close\r\nRetry-After: 5\r\nContent-Length: 0\r\n\r\n"


class Connections:
    """Runs in the event loop's thread, from its making until `close`."""

    def __init__(
        self,
        sock: socket.socket,  # listens and does not block; `close` closes it
        config: Config,  # of uvicorn, loaded
        pacer: Pacer,
    ) -> None:
        self.config, self.state, self.pacer = config, ServerState(), pacer
        self.loop = asyncio.get_running_loop()
        self.open: set[HttpConnection] = set()
        self._of_address: Counter[str] = Counter()
        self._socket = sock
        self._opening: set[asyncio.Task[object]] = set()
        self._closed = False
        self._watch_timer = self.loop.call_later(WATCH_S, self._watch)
        self._listen()

    async def close(
        self,
        patience_s: float,  # for answers under way
    ) -> None:
        """Accept no more, end every connection, and wait until all have ended."""
        self._closed = True
        self._watch_timer.cancel()
        self.loop.remove_reader(self._socket)
        self._socket.close()
        if self._opening:
            await asyncio.wait(self._opening)
        deadline_s = self.loop.time() + patience_s
        while self.open and self.loop.time() < deadline_s:
            for connection in list(self.open):
                if connection.idle:
                    connection.hang_up()
            await asyncio.sleep(0.01)
        for connection in list(self.open):
            connection.transport.abort()
        tasks = list(self.state.tasks)
        if tasks:
            await asyncio.wait(tasks, timeout=patience_s)
        for task in self.state.tasks:
            task.cancel()

    # -- what connections call ---------------------------------------------------------------------------------------

    def enter(self, connection: HttpConnection) -> None:
        """Count the connection."""
        self.open.add(connection)
        self._of_address[connection.address] += 1

    def leave(self, connection: HttpConnection) -> None:
        """Stop counting it. May be called twice."""
        if connection in self.open:
            self.open.discard(connection)
            self._of_address[connection.address] -= 1
            if not self._of_address[connection.address]:
                del self._of_address[connection.address]

    # -- inside --------------------------------------------------------------------------------------------------------

    def _listen(self) -> None:
        if not self._closed:
            self.loop.add_reader(self._socket, self._accept)

    def _pause(self, seconds: float) -> None:
        self.loop.remove_reader(self._socket)
        self.loop.call_later(seconds, self._listen)

    def _accept(self) -> None:
        for _ in range(ACCEPTED_AT_ONCE):
            try:
                sock, peer = self._socket.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                logger.error(
                    "kvkern: no HTTP client can connect: %(error)s; raise the limit on open files (ulimit -n)",
                    {"event": "no_http_client_can_connect", "error": error.strerror},
                )
                self._pause(PAUSE_S)
                return
            self._meet(sock, share_of(peer[0]))
        self._pause(ACCEPT_GAP_S)

    def _meet(self, sock: socket.socket, address: str) -> None:
        sock.setblocking(False)
        if not self._make_room(address):
            with sock, contextlib.suppress(OSError):
                sock.send(_FULL)
            return
        connection = HttpConnection(self, address)
        task = self.loop.create_task(self.loop.connect_accepted_socket(lambda: connection, sock))
        self._opening.add(task)
        task.add_done_callback(lambda done: self._opened(done, connection))

    def _opened(self, task: asyncio.Task[object], connection: HttpConnection) -> None:
        self._opening.discard(task)
        if task.cancelled() or task.exception() is not None:
            self.leave(connection)

    def _make_room(self, address: str) -> bool:
        """Return True if another connection of this address may be opened. Closes one that waits, if necessary."""
        if self._of_address[address] >= MAX_OF_ADDRESS:
            others = [connection for connection in self.open if connection.address == address]
        elif len(self.open) >= MAX_CONNECTIONS:
            others = list(self.open)
        else:
            return True
        waiting = [c for c in others if c.idle and c.transport is not None]
        if not waiting:
            return False
        oldest = min(waiting, key=lambda connection: connection.since_s)
        self.leave(oldest)
        oldest.transport.abort()
        return True

    def _watch(self) -> None:
        self._watch_timer = self.loop.call_later(WATCH_S, self._watch)
        now_s = self.loop.time()
        for connection in list(self.open):
            if connection.transport is not None:
                connection.watch(now_s)


def share_of(address: str) -> str:
    """Return whose share a remote address is: an IPv4 address its own, IPv6 addresses of one /64 the same."""
    try:
        found = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if found.version == 6 and (mapped := found.ipv4_mapped) is not None:
        return str(mapped)
    return str(found) if found.version == 4 else str(ipaddress.ip_network((int(found), 64), strict=False))
