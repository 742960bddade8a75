"""Replies that are no values: those of the login, and a cluster's map. Every length that a server announces has a limit.

    AUTH, CLIENT SETINFO, SELECT    one line each, at most as long as a line may be (connection.py)
    CLUSTER SLOTS                   nested lists, at most MOST_MAP_NBYTES, MOST_MAP_ITEMS and MOST_DEPTH

The deadline counts for the whole exchange, however often a few bytes come. So a server that drips or announces gigabytes costs
neither time beyond the deadline nor memory.
"""

from __future__ import annotations

from ..base import RemoteError
from .connection import RedisConnection, RefusedError, command, error_reply, is_turned_away, login_refused

MOST_MAP_NBYTES = 8 << 20  # of a reply to CLUSTER SLOTS: 16,384 ranges with two replicas each have some 5 MiB
MOST_MAP_ITEMS = 500_000
MOST_DEPTH = 5
_MOST_TEXT_NBYTES = 1024  # a host name, an id


def log_in(
    connection: RedisConnection,
    user: str,
    password: str,
    database: int,
    deadline: float,
) -> None:
    """Send the first commands of a connection and check the answers. Raises OSError, RemoteError and RefusedError."""
    if user or password:
        line = _ask(connection, [b"AUTH", *([user.encode()] if user else []), password.encode()], deadline)
        if user and b"wrong number of arguments" in line:  # Redis before version 6 has passwords, but no users
            line = _ask(connection, [b"AUTH", password.encode()], deadline)
        if line[:1] == b"-":
            raise login_refused(connection.name, line, password)
        _expect_ok(connection, line)
    line = _ask(connection, [b"CLIENT", b"SETINFO", b"LIB-NAME", b"kvkern"], deadline)
    if is_turned_away(line):
        raise error_reply(connection.name, line)
    if line[:1] != b"-":  # servers before 7.2 and users without the right refuse it: it is only for `CLIENT LIST`
        _expect_ok(connection, line)
    if database:
        line = _ask(connection, [b"SELECT", b"%d" % database], deadline)
        if line.startswith(b"-ERR "):
            said = line[1:200].decode(errors="replace")
            raise RefusedError(
                f"{connection.name} has no database {database} ({said}). Name one that it has, usually /0"
            )
        if line[:1] == b"-":
            raise error_reply(connection.name, line)
        _expect_ok(connection, line)


def cluster_slots(connection: RedisConnection, deadline: float) -> object:
    """Return the reply to CLUSTER SLOTS: lists, integers, bytes and None. Raises OSError, RemoteError and RefusedError."""
    connection.send(command(b"CLUSTER", b"SLOTS"), deadline)
    return _Reply(connection, deadline).read(0)


class _Reply:
    """A nested reply, read within its limits."""

    def __init__(self, connection: RedisConnection, deadline: float) -> None:
        self._connection, self._deadline = connection, deadline
        self._nbytes, self._items = MOST_MAP_NBYTES, MOST_MAP_ITEMS  # that may still come

    def read(self, depth: int) -> object:
        line = self._connection.read_line(self._deadline)
        kind, rest = line[:1], line[1:]
        self._nbytes -= len(line)
        self._items -= 1
        if self._nbytes < 0:
            raise self._too_large()
        if kind == b"-":
            raise error_reply(self._connection.name, line)
        if kind == b"+":
            return rest
        if kind == b":":
            return self._number(rest)
        if kind == b"$":
            nbytes = self._connection.bulk_length(line)
            return None if nbytes is None else self._text(nbytes)
        if kind != b"*":
            raise self._connection.unexpected_reply(line)
        count = self._number(rest)
        if count < 0:
            return None
        if depth == MOST_DEPTH or count > self._items:
            raise self._too_large()
        return [self.read(depth + 1) for _ in range(count)]

    def _number(self, digits: bytes) -> int:
        if not digits.removeprefix(b"-").isdigit() or len(digits) > 20:
            raise self._connection.unexpected_reply(digits)
        return int(digits)

    def _text(self, nbytes: int) -> bytes:
        self._nbytes -= nbytes
        if nbytes > _MOST_TEXT_NBYTES or self._nbytes < 0:
            raise self._too_large()
        text = bytearray(nbytes)
        self._connection.read_bulk([memoryview(text)], self._deadline)
        return bytes(text)

    def _too_large(self) -> RemoteError:
        return RemoteError(
            f"{self._connection.name} describes its cluster in more than {MOST_MAP_NBYTES} bytes or {MOST_MAP_ITEMS} items, "
            f"which no cluster needs; check that it is a Redis or Valkey cluster"
        )


def _ask(connection: RedisConnection, words: list[bytes], deadline: float) -> bytes:
    connection.send(command(*words), deadline)
    return connection.read_line(deadline)


def _expect_ok(connection: RedisConnection, line: bytes) -> None:
    if line != b"+OK":
        raise connection.unexpected_reply(line)
