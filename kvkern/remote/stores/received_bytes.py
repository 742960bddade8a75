"""Ends the calls of a client library that has no limit of its own when a server sends far more than it was asked for.

obstore joins the whole body of an error, and a body in chunks, in memory, however long it is. So while calls are under way,
this module asks the kernel now and then how much came over the connections to the server's port. It cancels all calls when that
is more than they may have:

    2 x bytes asked for  +  REQUEST_NBYTES per request  +  SLACK_NBYTES

A look takes some 25 us per connection. The first one comes after LOOK_S, so most calls cost nothing; the others take at most a
twentieth of the time. What comes before the first look and between two of them is not bounded: at 1 GB/s that is 20 to 50 MB.
Connections through a proxy, whose port is another, are not seen. Knows no store.
"""

from __future__ import annotations

import array
import asyncio
import fcntl
import os
import socket
import stat
import struct
import termios
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress

LOOK_S = 0.02
REQUEST_NBYTES = 512 << 10  # headers, and what the library reads ahead of a body that it then drops
SLACK_NBYTES = 16 << 20
_RECEIVED = struct.Struct("=128xQ")  # tcp_info: tcpi_bytes_received
_INET = {socket.AF_INET, socket.AF_INET6}


class ReceiveGuard:
    """Watches the calls to one port. Use it from one event loop."""

    def __init__(self, port: int) -> None:
        self._received = _ReceivedBytes(port)
        self._calls: list[Collection[asyncio.Task[None]]] = []
        self._allowed_nbytes = 0  # that all calls since the guard was last idle may receive together
        self._watching: asyncio.Task[None] | None = None
        self._tripped: list[Collection[asyncio.Task[None]]] = []  # calls that were cancelled

    @contextmanager
    def watched(self, tasks: Collection[asyncio.Task[None]], requests: int, asked_nbytes: int) -> Iterator[None]:
        """Cancel the tasks if too much comes while the block runs. Then `has_tripped` is true for them."""
        if not self._calls:
            self._allowed_nbytes = SLACK_NBYTES
        self._allowed_nbytes += 2 * asked_nbytes + REQUEST_NBYTES * requests
        self._calls.append(tasks)
        if self._watching is None:
            self._watching = asyncio.get_running_loop().create_task(self._watch())
        try:
            yield
        finally:
            self._calls = [call for call in self._calls if call is not tasks]
            self._tripped = [call for call in self._tripped if call is not tasks]
            if not self._calls:
                self._watching.cancel()
                self._watching = None

    def has_tripped(self, tasks: Collection[asyncio.Task[None]]) -> bool:
        """Return True inside `watched` if these tasks were cancelled because too much came."""
        return any(call is tasks for call in self._tripped)

    async def _watch(self) -> None:
        await asyncio.sleep(LOOK_S)
        self._received.restart()
        took_s = 0.0
        while True:
            await asyncio.sleep(max(LOOK_S, 20 * took_s))
            began_s = time.perf_counter()
            too_much = self._received.nbytes() > self._allowed_nbytes
            took_s = time.perf_counter() - began_s
            if too_much:
                self._tripped = list(self._calls)
                for tasks in self._calls:
                    for task in tasks:
                        task.cancel()


class _ReceivedBytes:
    """What this process has read from its TCP connections to a port, as the kernel counts it."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._others: set[int] = set()  # inodes of sockets that are not such connections
        self._seen: dict[int, int] = {}  # inode -> bytes so far
        self._nbytes = 0

    def restart(self) -> None:
        """Count from here."""
        self._others, self._seen = set(), {}
        self.nbytes()
        self._nbytes = 0

    def nbytes(self) -> int:
        """Return the bytes since `restart`."""
        seen: dict[int, int] = {}
        for name in _open_files():
            with suppress(OSError):  # closed meanwhile
                if stat.S_ISSOCK((found := os.fstat(int(name))).st_mode) and found.st_ino not in self._others:
                    self._look(int(name), seen)
        self._nbytes += sum(count - self._seen.get(inode, 0) for inode, count in seen.items())
        self._seen = seen
        return self._nbytes

    def _look(self, fd: int, seen: dict[int, int]) -> None:
        with socket.socket(fileno=os.dup(fd)) as sock:  # of our own: the library may close its descriptor meanwhile
            inode = os.fstat(sock.fileno()).st_ino
            if sock.family not in _INET or sock.type != socket.SOCK_STREAM or sock.getpeername()[1] != self._port:
                self._others.add(inode)
                return
            said = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _RECEIVED.size)
            if len(said) < _RECEIVED.size:  # a kernel that does not count: nothing is watched
                return
            waiting = array.array("i", [0])  # in the kernel, not read yet
            fcntl.ioctl(sock, termios.FIONREAD, waiting)
            seen[inode] = _RECEIVED.unpack(said)[0] - waiting[0]


def _open_files() -> list[str]:
    try:
        return os.listdir("/proc/self/fd")
    except OSError:  # a sandbox without /proc, or no descriptor left: nothing is watched now
        return []
