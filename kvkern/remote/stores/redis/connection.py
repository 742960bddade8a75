"""A connection to a Redis or Valkey server. redis-py sets it up; values then go past it, from and into the caller's memory.

    recvmsg([header, payload, spare])    both pieces of a value where they belong; what follows them, a few bytes, to spare

That is one copy, the kernel's, where redis-py and hiredis make three more. Understood is what the store asks for: replies
of one line, and bulk strings. All else is an error, and after an error a connection is closed: what is left of a reply
could otherwise be taken for the next one.
"""

from __future__ import annotations

import select
import socket
import ssl
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from redis import Connection, SSLConnection, UnixDomainSocketConnection, exceptions
from redis.backoff import NoBackoff
from redis.retry import Retry

from ..base import RemoteError

_SPARE_NBYTES = 4096  # the longest line a server may say; more would only be copied once more
_SMALL_NBYTES = 8192  # pieces below are joined before they are sent
_JUNK_NBYTES = 1 << 16
_MOST_PIECES = 256  # of one sendmsg; the kernel takes 1024
_MOST_NBYTES = 1 << 32  # of a reply; the largest string of a server has 512 MiB
_KEEPALIVE = {socket.TCP_KEEPIDLE: 30, socket.TCP_KEEPINTVL: 10, socket.TCP_KEEPCNT: 3}

Address = tuple[str, int]
Piece = bytes | memoryview


class RefusedError(RemoteError):
    """The server says no, and a user can mend it."""


class RedisConnection:
    """One connection, of one thread at a time. Raises OSError when it ends or is late, RemoteError for what is no RESP."""

    def __init__(self, connection: Any, address: Address, name: str) -> None:
        self.address = address
        self.name = name
        self._connection = connection  # redis.Connection, connected; its end closes the socket
        self._sock: socket.socket = connection._sock
        self._scatters = not isinstance(self._sock, ssl.SSLSocket)
        self._spare = memoryview(bytearray(_SPARE_NBYTES))  # received and not yet looked at: [begin, end)
        self._begin = self._end = 0

    def close(self) -> None:
        """At once, whatever is under way."""
        self._connection.disconnect()

    def idle(self) -> bool:
        """Whether it is open and silent, as it has to be between calls."""
        poll = select.poll()
        poll.register(self._sock, select.POLLIN)
        return self._begin == self._end and not poll.poll(0)

    def send(self, pieces: Iterable[Piece], deadline: float) -> None:
        """All pieces, one behind the other."""
        rest = _joined(pieces)
        while rest:
            self._sock.settimeout(left(deadline))
            sent = self._sock.sendmsg(rest[:_MOST_PIECES]) if self._scatters else self._sock.send(rest[0])
            rest = _behind(rest, sent)

    def line(self, deadline: float) -> bytes:
        """The next line, without its end."""
        while True:
            held = bytes(self._spare[self._begin : self._end])
            nbytes = held.find(b"\r\n")
            if nbytes >= 0:
                self._begin += nbytes + 2
                return held[:nbytes]
            if len(held) == _SPARE_NBYTES:
                raise self.surprise(held)
            self._spare[: len(held)] = held
            self._begin, self._end = 0, len(held)
            self._end += self._receive([self._spare[self._end :]], deadline)

    def length(self, line: bytes) -> int | None:
        """Bytes of the bulk string that a line begins; None for one that is not there."""
        if line == b"$-1":
            return None
        if line[:1] != b"$" or not line[1:].isdigit() or not int(line[1:]) < _MOST_NBYTES:
            raise self.surprise(line)
        return int(line[1:])

    def read(self, pieces: Sequence[memoryview], deadline: float) -> None:
        """A bulk string that is exactly as long as the pieces, into them."""
        self._fill(pieces, deadline)
        self._expect_end(deadline)

    def skip(self, nbytes: int, deadline: float) -> None:
        """A bulk string, into nothing."""
        junk = memoryview(bytearray(min(nbytes, _JUNK_NBYTES)))
        while nbytes:
            piece = junk[: min(nbytes, _JUNK_NBYTES)]
            self._fill([piece], deadline)
            nbytes -= len(piece)
        self._expect_end(deadline)

    def surprise(self, line: bytes) -> RemoteError:
        """To raise: it said what no server says here."""
        return RemoteError(f"{self.name} sent {line[:40]!r}, which is no answer to what it was asked")

    def _fill(self, pieces: Sequence[memoryview], deadline: float) -> None:
        need = sum(map(len, pieces))
        held = min(need, self._end - self._begin)
        stop = self._begin + held
        for piece in pieces:
            part = self._spare[self._begin : min(self._begin + len(piece), stop)]
            piece[: len(part)] = part
            self._begin += len(part)
        rest, need = _behind(pieces, held), need - held
        while need > 0:  # spare is empty
            got = self._receive([*rest, self._spare], deadline)
            self._begin, self._end = 0, max(0, got - need)
            rest, need = _behind(rest, got), need - got

    def _expect_end(self, deadline: float) -> None:
        line = self.line(deadline)
        if line:
            raise self.surprise(line)

    def _receive(self, into: list[memoryview], deadline: float) -> int:
        self._sock.settimeout(left(deadline))
        got = self._sock.recvmsg_into(into)[0] if self._scatters else self._sock.recv_into(into[0])
        if not got:
            raise ConnectionResetError("it was closed by the server")
        return got


def command(*words: Piece) -> list[Piece]:
    """A command in RESP, as pieces to send; memory is not copied."""
    pieces: list[Piece] = [b"*%d\r\n" % len(words)]
    for word in words:
        pieces += [b"$%d\r\n" % len(word), word, b"\r\n"]
    return pieces


def left(deadline: float) -> float:
    """Seconds. Raises TimeoutError if there are none."""
    seconds = deadline - time.monotonic()
    if seconds <= 0:
        raise TimeoutError("it did not answer in time")
    return seconds


def _joined(pieces: Iterable[Piece]) -> list[memoryview]:
    """The same bytes in fewer pieces."""
    result: list[memoryview] = []
    small: list[Piece] = []
    for piece in pieces:
        if len(piece) < _SMALL_NBYTES:
            small.append(piece)
            continue
        if small:
            result.append(memoryview(b"".join(small)))
            small = []
        result.append(memoryview(piece))
    return [*result, memoryview(b"".join(small))] if small else result


def _behind(pieces: Sequence[memoryview], nbytes: int) -> list[memoryview]:
    """What is left of the pieces behind their first bytes; it begins with no empty one."""
    for index, piece in enumerate(pieces):
        if nbytes < len(piece):
            return [piece[nbytes:], *pieces[index + 1 :]]
        nbytes -= len(piece)
    return []


# -- connecting --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Dialer:
    """How servers are reached, wherever they are."""

    user: str = ""
    password: str = field(default="", repr=False)
    database: int = 0
    socket_path: str = ""  # a Unix socket, instead of all addresses
    tls: Mapping[str, Any] | None = None  # arguments of redis.SSLConnection

    def dial(self, address: Address, deadline: float) -> Any:  # redis.Connection
        """Connected and logged in. Raises RemoteError, RefusedError among them."""
        try:
            connection = self._connection(address, deadline)
            connection.connect()
        except (exceptions.RedisError, OSError, ValueError) as error:
            raise self._failure(address, error) from error
        return connection

    def name(self, address: Address) -> str:
        """For messages."""
        host, port = address
        return self.socket_path or (f"[{host}]:{port}" if ":" in host else f"{host}:{port}")

    def _connection(self, address: Address, deadline: float) -> Any:
        seconds = left(deadline)
        options: dict[str, Any] = {
            "db": self.database, "username": self.user or None, "password": self.password or None, "protocol": 2,
            "retry": Retry(NoBackoff(), 0), "socket_timeout": seconds,
        }  # fmt: skip
        if self.socket_path:
            return UnixDomainSocketConnection(path=self.socket_path, **options)
        host, port = address
        addresses = socket.getaddrinfo(host, port, 0, socket.SOCK_STREAM)  # each of which may take its time
        options |= {
            "host": host, "port": port, "socket_connect_timeout": seconds / len(addresses),
            "socket_keepalive": True, "socket_keepalive_options": _KEEPALIVE,
        }  # fmt: skip
        return Connection(**options) if self.tls is None else SSLConnection(**options, **self.tls)

    def _failure(self, address: Address, error: BaseException) -> RemoteError:
        name, said = self.name(address), f"{error}"[:200]
        for cause in _causes(error):
            if isinstance(cause, ssl.SSLCertVerificationError):
                return RefusedError(
                    f"the certificate of {name} does not verify ({cause.verify_message}); name the authority that signed "
                    f"it with ca_file=PATH, or a host that it is made out to"
                )
            if isinstance(cause, ssl.SSLError) and not isinstance(cause, ssl.SSLEOFError | ssl.SSLZeroReturnError):
                return RefusedError(
                    f"no TLS with {name} ({cause.reason or cause}); check that the port is its TLS port, and ca_file, "
                    f"cert_file and key_file"
                )
        if isinstance(error, exceptions.AuthenticationError):
            return RefusedError(_REMEDIES["WRONGPASS" if self.password else "NOAUTH"].format(name=name, said=said))
        if isinstance(error, exceptions.NoPermissionError):
            return RefusedError(_REMEDIES["NOPERM"].format(name=name, said=said))
        if self.database and isinstance(error, exceptions.ResponseError):
            return RefusedError(f"{name} has no database {self.database} ({said}); name one that it has, most often /0")
        return RemoteError(f"{name} cannot be reached: {said}{self._hint(error)}")

    def _hint(self, error: BaseException) -> str:
        """What it may be: a server that is spoken to in the wrong way hangs up or waits, and seldom says why."""
        causes = list(_causes(error))
        late = any(isinstance(cause, TimeoutError) for cause in causes)
        if self.socket_path or isinstance(causes[-1], ConnectionRefusedError | socket.gaierror):
            return ""
        if self.tls is None:
            return "" if late else "; if it wants TLS, say rediss:// or valkeys://"
        if late:
            return "; if it speaks no TLS, say redis:// or valkey://"
        return "" if self.tls["ssl_certfile"] else "; if it wants a certificate of ours, give cert_file and key_file"


def _causes(error: BaseException | None) -> Iterable[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


_REMEDIES = {  # the first word of an error that a user can mend
    "NOAUTH": "{name} does not let us in ({said}); give user and password: scheme://user:password@host, or password_file",
    "WRONGPASS": "{name} does not let us in ({said}); mend user and password of the URL",
    "NOPERM": "{name} gives too few rights ({said}); on the server: ACL SETUSER <user> +get +set +exists +unlink "
    "~<prefix>kvkern*, and in a cluster +cluster|slots",
    "READONLY": "{name} is a replica ({said}); name its master",
    "MOVED": "{name} belongs to a cluster ({said}); say redis+cluster:// (rediss+cluster:// with TLS)",
}


def refusal(name: str, line: bytes) -> RemoteError:
    """To raise for an error reply, `-WORD what is wrong`."""
    said = line[1:].decode(errors="replace")[:200]
    word = said.partition(" ")[0]
    if word in _REMEDIES:
        return RefusedError(_REMEDIES[word].format(name=name, said=said))
    if said.startswith("ERR unknown command"):
        return RefusedError(f"{name} is no Redis 4 or later, nor a Valkey ({said})")
    if "cluster support disabled" in said:
        return RefusedError(f"{name} is no cluster ({said}); say redis:// (rediss:// with TLS)")
    return RemoteError(f"{name} says: {said}")
