"""Which server has a key: the one there is, or a cluster's by slot. And a server's connections that are idle.

A cluster's map is read at the start, after a redirection and after a failure, at most once in a second; calls go on with
the old one meanwhile, and a redirection names the right server anyway.
"""

from __future__ import annotations

import time
from binascii import crc_hqx
from collections import deque
from collections.abc import Sequence
from threading import Lock
from typing import Any, Protocol

from redis import exceptions

from ..base import RemoteError
from .batch import ConnectionShare
from .connection import Address, Dialer, RedisConnection, RefusedError, command, left, refusal

_NUM_SLOTS = 16384
_REFRESH_S = 1.0
_PROBE_MS = b"10000"


class RedisServer:
    """One address, and the connections to it that nobody uses just now. Of any thread."""

    def __init__(self, dialer: Dialer, address: Address) -> None:
        self.address = address
        self.name = dialer.name(address)
        self._dialer = dialer
        self._idle: deque[RedisConnection] = deque()  # as many as ever were in use at once
        self._closed = False

    def work(self, share: ConnectionShare) -> None:
        """Do a share. Raises RemoteError. A connection that turns out to be dead is replaced once by a new one."""
        if not share.queue:  # others have been faster
            return None
        link = self._pooled()
        if link is not None:
            try:
                return self._drive(link, share)
            except OSError as error:
                if time.monotonic() >= share.deadline:
                    raise self._broken(error) from error
        try:
            self._drive(self.connect(share.deadline), share)
        except OSError as error:
            raise self._broken(error) from error

    def connect(self, deadline: float) -> RedisConnection:
        """A new connection. Raises RemoteError, and OSError if there is no time left."""
        left(deadline)
        return RedisConnection(self._dialer.dial(self.address, deadline), self.address, self.name)

    def probe(self, name: bytes, cluster: bool, deadline: float) -> None:
        """Try all that will be asked of it, with a value that goes away. Raises RemoteError."""
        try:
            link = self.connect(deadline)
            try:
                _probe(link, name, cluster, deadline)
            finally:
                link.close()
        except OSError as error:
            raise self._broken(error) from error

    def slots(self, deadline: float) -> Any:
        """What it says of its cluster's slots, in whatever form. Raises RemoteError."""
        connection = self._dialer.dial(self.address, deadline)
        try:
            connection.send_command("CLUSTER", "SLOTS")
            return connection.read_response()
        except exceptions.ResponseError as error:
            raise refusal(self.name, b"-%s" % str(error).encode()) from error
        except (exceptions.RedisError, OSError, ValueError) as error:
            raise self._broken(error) from error
        finally:
            connection.disconnect()

    def close(self) -> None:
        """Close what is idle; what is in use is closed when it comes back."""
        self._closed = True
        while (link := self._pooled()) is not None:
            link.close()

    def _drive(self, link: RedisConnection, share: ConnectionShare) -> None:
        done = False
        try:
            share.drive(link)
            done = True
        finally:
            if done:
                self._give(link)
            else:
                link.close()

    def _give(self, link: RedisConnection) -> None:
        self._idle.append(link)
        if self._closed:
            self.close()

    def _pooled(self) -> RedisConnection | None:
        while True:
            try:
                link = self._idle.pop()
            except IndexError:
                return None
            if link.idle():
                return link
            link.close()

    def _broken(self, error: Exception) -> RemoteError:
        if isinstance(error, TimeoutError):
            return RemoteError(f"{self.name} did not answer in time")
        return RemoteError(f"the connection to {self.name} broke: {error}")


def _probe(link: RedisConnection, name: bytes, cluster: bool, deadline: float) -> None:
    asked = [(b"EXISTS", name), (b"GET", name), (b"SET", name, b"", b"PX", _PROBE_MS), (b"UNLINK", name)]
    link.send([piece for words in asked for piece in command(*words)], deadline)
    for verb, *_ in asked:
        line = link.line(deadline)
        if line[:1] == b"-":
            if line[1:].split(b" ")[0] not in _OF_THE_MOMENT[cluster]:
                raise refusal(link.name, line)
        elif verb == b"GET" and (nbytes := link.length(line)) is not None:
            link.skip(nbytes, deadline)
    if not cluster:  # only a cluster's server answers this, whichever slots it has
        link.send(command(b"CLUSTER", b"KEYSLOT", name), deadline)
        line = link.line(deadline)
        if line[:1] == b":":
            raise refusal(link.name, b"-MOVED is what it says of other servers' keys")


_OF_THE_MOMENT = {False: (b"OOM",), True: (b"OOM", b"MOVED", b"ASK", b"TRYAGAIN")}  # errors that say nothing is amiss


class RedisServers(Protocol):
    """The servers of a store. Of any thread."""

    cluster: bool

    def stale(self) -> bool:
        """Whether `refresh` should be called first."""

    def refresh(self, deadline: float) -> None:
        """Read the map anew. Raises RemoteError if there is none."""

    def parts(self, names: Sequence[bytes]) -> list[tuple[RedisServer, list[int]]]:
        """Who has which of the keys, in their order. Never blocks. Raises RemoteError if there is no map."""

    def server(self, address: Address) -> RedisServer:
        """The one of that address."""

    def failed(self, address: Address | None) -> None:
        """The map is old: read it anew when the time comes, and not from that server if there are others."""

    def close(self) -> None:
        """Close every connection."""


class OneServer:
    """`RedisServers` of a server without others."""

    cluster = False

    def __init__(self, dialer: Dialer, address: Address) -> None:
        self._server = RedisServer(dialer, address)

    def stale(self) -> bool:
        return False

    def refresh(self, deadline: float) -> None:
        pass

    def parts(self, names: Sequence[bytes]) -> list[tuple[RedisServer, list[int]]]:
        return [(self._server, list(range(len(names))))]

    def server(self, address: Address) -> RedisServer:
        return self._server

    def failed(self, address: Address | None) -> None:
        pass

    def close(self) -> None:
        self._server.close()


class Cluster:
    """`RedisServers` of a cluster: every master has a range of the slots, or several."""

    cluster = True

    def __init__(self, dialer: Dialer, seeds: Sequence[Address]) -> None:
        self._dialer = dialer
        self._seeds = seeds
        self._servers: dict[Address, RedisServer] = {}
        self._owners: list[Address | None] = []  # by slot; empty: never read
        self._suspects: set[Address | None] = set()  # since the map was read; any makes it stale
        self._lock = Lock()  # of all four
        self._reading = Lock()
        self._next_refresh = 0.0

    def stale(self) -> bool:
        return not self._owners or (bool(self._suspects) and time.monotonic() >= self._next_refresh)

    def refresh(self, deadline: float) -> None:
        if not self._reading.acquire(timeout=max(0.0, deadline - time.monotonic())):
            raise RemoteError("reading the cluster's slots takes too long")
        try:
            if self.stale():
                self._next_refresh = time.monotonic() + _REFRESH_S
                self._refresh(deadline)
        finally:
            self._reading.release()

    def parts(self, names: Sequence[bytes]) -> list[tuple[RedisServer, list[int]]]:
        parts: dict[Address | None, list[int]] = {}
        for index, name in enumerate(names):
            parts.setdefault(self._owners[crc_hqx(name, 0) % _NUM_SLOTS], []).append(index)
        somebody = next(owner for owner in self._owners if owner is not None)  # says what is amiss with slots of nobody
        return [(self.server(address or somebody), indices) for address, indices in parts.items()]

    def server(self, address: Address) -> RedisServer:
        with self._lock:
            if address not in self._servers:
                self._servers[address] = RedisServer(self._dialer, address)
            return self._servers[address]

    def failed(self, address: Address | None) -> None:
        with self._lock:
            self._suspects.add(address)

    def close(self) -> None:
        with self._lock:
            for server in self._servers.values():
                server.close()

    def _refresh(self, deadline: float) -> None:
        errors: list[RemoteError] = []
        addresses = list(dict.fromkeys([*self._servers, *self._seeds]))
        addresses.sort(key=lambda address: address in self._suspects)
        for tried, address in enumerate(addresses):
            now = time.monotonic()
            share_s = (deadline - now) / min(3, len(addresses) - tried)  # one that hangs leaves time for others
            try:
                self._take(_owners(self.server(address).slots(now + share_s), address))
            except RemoteError as error:
                errors.append(error)
            else:
                return
        if not self._owners:
            errors.sort(key=lambda error: not isinstance(error, RefusedError))
            raise errors[0]

    def _take(self, owners: list[Address | None]) -> None:
        with self._lock:
            self._owners, self._suspects = owners, set()
            for address in set(self._servers).difference(owners):
                self._servers.pop(address).close()


def _owners(answer: object, asked: Address) -> list[Address | None]:
    """The masters by slot, of CLUSTER SLOTS' `[first, last, [host, port, ...], replicas...], ...`. Raises RemoteError."""
    owners: list[Address | None] = [None] * _NUM_SLOTS
    for row in answer if isinstance(answer, list) else [answer]:
        match row:
            case [int(first), int(last), [bytes() | None as host, int(port), *_], *_] if (
                0 <= first <= last < _NUM_SLOTS and 0 < port < 1 << 16
            ):
                owner = (host.decode(errors="replace") if host else asked[0], port)
                owners[first : last + 1] = [owner] * (last + 1 - first)
            case _:
                raise RemoteError(f"{asked[0]}:{asked[1]} describes its cluster as {row!r:.100}, which cannot be read")
    if not any(owners):
        raise RemoteError(f"the cluster of {asked[0]}:{asked[1]} has given its slots to no server yet")
    return owners
