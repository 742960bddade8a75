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
        self._allowed_nbytes = 0  # that the calls under way may receive together
        self._ended_nbytes = 0  # that calls might have received which have ended since the last look
        self._watching: asyncio.Task[None] | None = None
        self._tripped: list[Collection[asyncio.Task[None]]] = []  # calls that were cancelled

    @contextmanager
    def watched(self, tasks: Collection[asyncio.Task[None]], requests: int, asked_nbytes: int) -> Iterator[None]:
        """Cancel the tasks if too much comes while the block runs. Then `has_tripped` is true for them."""
        if not self._calls:
            self._ended_nbytes = 0
        allowed_nbytes = 2 * asked_nbytes + REQUEST_NBYTES * requests
        self._allowed_nbytes += allowed_nbytes
        self._calls.append(tasks)
        if self._watching is None:
            self._watching = asyncio.get_running_loop().create_task(self._watch())
        try:
            yield
        finally:
            self._calls = [call for call in self._calls if call is not tasks]
            self._tripped = [call for call in self._tripped if call is not tasks]
            self._allowed_nbytes -= allowed_nbytes
            self._ended_nbytes += allowed_nbytes
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
            too_much = self._received.nbytes() > SLACK_NBYTES + self._allowed_nbytes + self._ended_nbytes
            self._received.forget(1 << 62 if too_much else self._ended_nbytes)
            self._ended_nbytes = 0
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

    def forget(self, nbytes: int) -> None:
        """Count so many bytes less, at most those that were counted: they are settled."""
        self._nbytes -= min(nbytes, self._nbytes)

    def nbytes(self) -> int:
        """Return the bytes since `restart`, without those that were forgotten."""
        seen: dict[int, int] = {}
        if (names := _open_files()) is None:
            return self._nbytes
        for name in names:
            with suppress(OSError):  # closed meanwhile
                if stat.S_ISSOCK((found := os.fstat(int(name))).st_mode) and found.st_ino not in self._others:
                    if (before := self._seen.get(found.st_ino)) is not None:
                        seen[found.st_ino] = before  # if it cannot be looked at now, nothing more has come
                    self._look(int(name), seen)
        self._nbytes += sum(count - self._seen.get(inode, 0) for inode, count in seen.items())
        self._seen = seen
        return self._nbytes

    def _look(self, fd: int, seen: dict[int, int]) -> None:
        own = os.dup(fd)  # the library may close its descriptor meanwhile
        try:
            sock = socket.socket(fileno=own)
        except OSError:
            os.close(own)
            raise
        with sock:
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


def _open_files() -> list[str] | None:
    try:
        return os.listdir("/proc/self/fd")
    except OSError:  # a sandbox without /proc, or no descriptor left: nothing is watched now
        return None
