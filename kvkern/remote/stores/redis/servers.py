"""Finds the server of a key: a single server, or a cluster's server by slot. Keeps the idle connections of each server.

A cluster's map is read at the start, after a redirection and after a failure, at most once a second. Meanwhile calls go on
with the old map, since a redirection names the right server anyway.
"""

from __future__ import annotations

import time
from binascii import crc_hqx
from collections import deque
from collections.abc import Sequence
from threading import Lock
from typing import Protocol

from ..base import RemoteError
from .batch import ConnectionShare
from .connection import Address, Dialer, RedisConnection, RefusedError, command, error_reply, seconds_left
from .replies import cluster_slots, log_in

_NUM_SLOTS = 16384
_REFRESH_S = 1.0
_PROBE_MS = b"10000"


class RedisServer:
    """One address, and the idle connections to it. Use it from any thread."""

    def __init__(self, dialer: Dialer, address: Address) -> None:
        self.address = address
        self.name = dialer.server_name(address)
        self._dialer = dialer
        self._idle: deque[RedisConnection] = deque()  # at most as many as were ever in use at once
        self._closed = False

    def run(self, share: ConnectionShare) -> None:
        """Ask for the keys of a share. A dead idle connection is replaced once by a new one. Raises RemoteError."""
        if not share.queue:  # other connections have taken all keys
            return None
        connection = self._take_idle()
        if connection is not None:
            try:
                return self._drive(connection, share)
            except OSError as error:
                if time.monotonic() >= share.deadline:
                    raise self._connection_error(error) from error
        try:
            self._drive(self.connect(share.deadline), share)
        except OSError as error:
            raise self._connection_error(error) from error

    def connect(self, deadline: float) -> RedisConnection:
        """Open a connection. Raises RemoteError, and OSError if no time is left."""
        seconds_left(deadline)
        connection = RedisConnection(self._dialer.dial(self.address, deadline), self.address, self.name)
        done = False
        try:
            log_in(connection, self._dialer.user, self._dialer.password, self._dialer.database, deadline)
            done = True
        except OSError as error:
            raise self._dialer.failure(self.address, error) from error
        finally:
            if not done:
                connection.close()
        return connection

    def probe(self, name: bytes, cluster: bool, deadline: float) -> None:
        """Try every command that will be used, with a value that expires. Raises RemoteError."""
        try:
            connection = self.connect(deadline)
            try:
                _probe(connection, name, cluster, deadline)
            finally:
                connection.close()
        except OSError as error:
            raise self._connection_error(error) from error

    def cluster_slots(self, deadline: float) -> object:
        """Return its reply to CLUSTER SLOTS, unchecked. Raises RemoteError."""
        try:
            connection = self.connect(deadline)
            try:
                return cluster_slots(connection, deadline)
            finally:
                connection.close()
        except OSError as error:
            raise self._connection_error(error) from error

    def close(self) -> None:
        """Close the idle connections. A connection in use is closed when it comes back."""
        self._closed = True
        while (connection := self._take_idle()) is not None:
            connection.close()

    def _drive(self, connection: RedisConnection, share: ConnectionShare) -> None:
        done = False
        try:
            share.drive(connection)
            done = True
        finally:
            if done:
                self._give_back(connection)
            else:
                connection.close()

    def _give_back(self, connection: RedisConnection) -> None:
        self._idle.append(connection)
        if self._closed:
            self.close()

    def _take_idle(self) -> RedisConnection | None:
        while True:
            try:
                connection = self._idle.pop()
            except IndexError:
                return None
            if connection.is_idle():
                return connection
            connection.close()

    def _connection_error(self, error: Exception) -> RemoteError:
        if isinstance(error, TimeoutError):
            return RemoteError(f"{self.name} did not answer in time; see --remote-timeout")
        return RemoteError(f"the connection to {self.name} broke: {error}")


def _probe(connection: RedisConnection, name: bytes, cluster: bool, deadline: float) -> None:
    asked = [(b"EXISTS", name), (b"GET", name), (b"SET", name, b"", b"PX", _PROBE_MS), (b"UNLINK", name)]
    connection.send([piece for words in asked for piece in command(*words)], deadline)
    for verb, *_ in asked:
        line = connection.read_line(deadline)
        if line[:1] == b"-":
            if line[1:].split(b" ")[0] not in _PASSING_ERRORS[cluster]:
                raise error_reply(connection.name, line)
        elif verb == b"GET" and (nbytes := connection.bulk_length(line)) is not None:
            connection.skip_bulk(nbytes, deadline)
    if not cluster:  # only a cluster's server answers this, whatever slots it has
        connection.send(command(b"CLUSTER", b"KEYSLOT", name), deadline)
        line = connection.read_line(deadline)
        if line[:1] == b":":
            raise error_reply(connection.name, b"-MOVED is its reply for keys of other servers")


_PASSING_ERRORS = {
    False: (b"OOM",),
    True: (b"OOM", b"MOVED", b"ASK", b"TRYAGAIN"),
}  # errors that may pass: the configuration is right


class RedisServers(Protocol):
    """The servers of a store. Use it from any thread."""

    cluster: bool

    def needs_refresh(self) -> bool:
        """Return True if `refresh` should be called first."""

    def refresh(self, deadline: float) -> None:
        """Read the map anew. Raises RemoteError if no map is known."""

    def keys_by_server(self, names: Sequence[bytes]) -> list[tuple[RedisServer, list[int]]]:
        """Return each server with the indices of its keys, in their order. Never blocks. Raises RemoteError without a map."""

    def server_at(self, address: Address) -> RedisServer:
        """Return the server of an address."""

    def note_failure(self, address: Address | None) -> None:
        """Note that the map is old. The next `refresh` asks the server of `address` last; None: no server is suspected."""

    def interrupt(self) -> None:
        """End every connection at once, also those in use, and open no other."""

    def close(self) -> None:
        """Close every connection."""


class OneServer:
    """`RedisServers` of a single server."""

    cluster = False

    def __init__(self, dialer: Dialer, address: Address) -> None:
        self._dialer = dialer
        self._server = RedisServer(dialer, address)

    def needs_refresh(self) -> bool:
        return False

    def refresh(self, deadline: float) -> None:
        pass

    def keys_by_server(self, names: Sequence[bytes]) -> list[tuple[RedisServer, list[int]]]:
        return [(self._server, list(range(len(names))))]

    def server_at(self, address: Address) -> RedisServer:
        return self._server

    def note_failure(self, address: Address | None) -> None:
        pass

    def interrupt(self) -> None:
        self._dialer.interrupt()

    def close(self) -> None:
        self._server.close()


class Cluster:
    """`RedisServers` of a cluster: every master has one or more ranges of the slots."""

    cluster = True

    def __init__(self, dialer: Dialer, seeds: Sequence[Address]) -> None:
        self._dialer = dialer
        self._seeds = seeds
        self._servers: dict[Address, RedisServer] = {}
        self._owners: list[Address | None] = []  # by slot; empty: the map was never read
        self._suspects: set[Address | None] = set()  # noted since the map was read; any entry makes the map old
        self._lock = Lock()  # protects the four above
        self._reading = Lock()
        self._next_refresh = 0.0

    def needs_refresh(self) -> bool:
        return not self._owners or (bool(self._suspects) and time.monotonic() >= self._next_refresh)

    def refresh(self, deadline: float) -> None:
        if not self._reading.acquire(timeout=max(0.0, deadline - time.monotonic())):
            raise RemoteError("no server of the cluster named its slots in time; see --remote-timeout")
        try:
            if self.needs_refresh():
                self._next_refresh = time.monotonic() + _REFRESH_S
                self._refresh(deadline)
        finally:
            self._reading.release()

    def keys_by_server(self, names: Sequence[bytes]) -> list[tuple[RedisServer, list[int]]]:
        parts: dict[Address | None, list[int]] = {}
        for index, name in enumerate(names):
            parts.setdefault(self._owners[crc_hqx(name, 0) % _NUM_SLOTS], []).append(index)
        # Any owner will do for a slot that no server has: its error reply explains what is wrong.
        anyone = next(owner for owner in self._owners if owner is not None)
        return [(self.server_at(address or anyone), indices) for address, indices in parts.items()]

    def server_at(self, address: Address) -> RedisServer:
        with self._lock:
            if address not in self._servers:
                self._servers[address] = RedisServer(self._dialer, address)
            return self._servers[address]

    def note_failure(self, address: Address | None) -> None:
        with self._lock:
            self._suspects.add(address)

    def interrupt(self) -> None:
        self._dialer.interrupt()

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
            share_s = (deadline - now) / min(3, len(addresses) - tried)  # if one hangs, time is left for the others
            try:
                self._adopt(_owners(self.server_at(address).cluster_slots(now + share_s), address))
            except RemoteError as error:
                errors.append(error)
            else:
                return
        if not self._owners:
            errors.sort(key=lambda error: not isinstance(error, RefusedError))
            raise errors[0]

    def _adopt(self, owners: list[Address | None]) -> None:
        with self._lock:
            self._owners, self._suspects = owners, set()
            for address in set(self._servers).difference(owners):
                self._servers.pop(address).close()


def _owners(answer: object, asked: Address) -> list[Address | None]:
    """Parse `[first, last, [host, port, ...], replicas...], ...` of CLUSTER SLOTS into masters by slot. Raises RemoteError."""
    owners: list[Address | None] = [None] * _NUM_SLOTS
    for row in answer if isinstance(answer, list) else [answer]:
        match row:
            case [int(first), int(last), [bytes() | None as host, int(port), *_], *_] if (
                0 <= first <= last < _NUM_SLOTS and 0 < port < 1 << 16
            ):
                owner = (host.decode(errors="replace") if host else asked[0], port)
                owners[first : last + 1] = [owner] * (last + 1 - first)
            case _:
                raise RemoteError(
                    f"{asked[0]}:{asked[1]} describes its cluster as {row!r:.100}, which kvkern cannot parse; "
                    f"check that it is a Redis or Valkey cluster"
                )
    if not any(owners):
        raise RemoteError(
            f"no server of the cluster of {asked[0]}:{asked[1]} has slots yet. Assign the slots to its servers"
        )
    return owners
