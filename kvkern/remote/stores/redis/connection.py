"""A connection to a Redis or Valkey server. redis-py opens the socket; all that is said goes past it.

Values go from and into the caller's memory:

    recvmsg([header, payload, spare])    both pieces of a value go where they belong; the few bytes behind them go to spare

So the kernel makes the only copy; redis-py and hiredis make three more. The connection understands only the replies that the
store needs: replies of one line, and bulk strings. Anything else is an error. After an error the connection is closed, since
the rest of a reply could be taken for the next one. replies.py reads what is no value.

Every wait ends at the deadline of its call, and no announced length takes memory: a value goes into memory that is there,
and a line has at most _SPARE_NBYTES.
"""

from __future__ import annotations

import select
import socket
import ssl
import threading
import time
import weakref
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from redis import Connection, UnixDomainSocketConnection, exceptions
from redis.backoff import NoBackoff
from redis.retry import Retry

from ..base import RemoteError
from ..url import format_address

_SPARE_NBYTES = 4096  # the longest line of a server; a larger buffer only means that more bytes are copied twice
_SMALL_NBYTES = 8192  # smaller pieces are joined before they are sent
_JUNK_NBYTES = 1 << 16
_MOST_PIECES = 256  # of one sendmsg; the kernel takes 1024
_MOST_NBYTES = (512 << 20) + 1  # of a reply, too many: the largest string of a server has 512 MiB
_KEEPALIVE = {socket.TCP_KEEPIDLE: 30, socket.TCP_KEEPINTVL: 10, socket.TCP_KEEPCNT: 3}

Address = tuple[str, int]
Piece = bytes | memoryview


class RefusedError(RemoteError):
    """The server refuses, and a user can correct the reason."""


class RedisConnection:
    """One connection, used by one thread at a time.

    Raises OSError if the connection ends or is late, RemoteError for a reply that is not RESP.
    """

    def __init__(self, connection: Any, address: Address, name: str) -> None:
        self.address = address
        self.name = name
        self._connection = connection  # redis.Connection, connected; it owns the socket
        self._sock: socket.socket = connection._sock
        self._scatters = not isinstance(self._sock, ssl.SSLSocket)
        self._spare = memoryview(bytearray(_SPARE_NBYTES))  # received but not parsed yet: [begin, end)
        self._begin = self._end = 0

    def close(self) -> None:
        """Close it at once, whatever is under way."""
        self._connection.disconnect()

    def is_idle(self) -> bool:
        """Return True if it is open and silent, as it has to be between calls."""
        poll = select.poll()
        poll.register(self._sock, select.POLLIN)
        return self._begin == self._end and not poll.poll(0)

    def send(self, pieces: Iterable[Piece], deadline: float) -> None:
        """Send all pieces, one behind the other."""
        rest = _small_pieces_joined(pieces)
        while rest:
            self._sock.settimeout(seconds_left(deadline))
            sent = self._sock.sendmsg(rest[:_MOST_PIECES]) if self._scatters else self._sock.send(rest[0])
            rest = _without_first(rest, sent)

    def read_line(self, deadline: float) -> bytes:
        """Return the next line, without its end."""
        while True:
            held = bytes(self._spare[self._begin : self._end])
            nbytes = held.find(b"\r\n")
            if nbytes >= 0:
                self._begin += nbytes + 2
                return held[:nbytes]
            if len(held) == _SPARE_NBYTES:
                raise self.unexpected_reply(held)
            self._spare[: len(held)] = held
            self._begin, self._end = 0, len(held)
            self._end += self._receive([self._spare[self._end :]], deadline)

    def bulk_length(self, line: bytes) -> int | None:
        """Return the length of the bulk string that `line` begins, or None for a null bulk string."""
        if line == b"$-1":
            return None
        if line[:1] != b"$" or not line[1:].isdigit() or not int(line[1:]) < _MOST_NBYTES:
            raise self.unexpected_reply(line)
        return int(line[1:])

    def read_bulk(self, pieces: Sequence[memoryview], deadline: float) -> None:
        """Read a bulk string into `pieces`, which are exactly as long as it."""
        self._fill(pieces, deadline)
        self._expect_end(deadline)

    def skip_bulk(self, nbytes: int, deadline: float) -> None:
        """Read a bulk string and discard it."""
        junk = memoryview(bytearray(min(nbytes, _JUNK_NBYTES)))
        while nbytes:
            piece = junk[: min(nbytes, _JUNK_NBYTES)]
            self._fill([piece], deadline)
            nbytes -= len(piece)
        self._expect_end(deadline)

    def unexpected_reply(self, line: bytes) -> RemoteError:
        """Make the error for a reply that no server gives here."""
        return RemoteError(
            f"{self.name} sent {line[:40]!r}, which is no answer to the command. Check that it is a Redis or Valkey server"
        )

    def _fill(self, pieces: Sequence[memoryview], deadline: float) -> None:
        need = sum(map(len, pieces))
        held = min(need, self._end - self._begin)
        stop = self._begin + held
        for piece in pieces:
            part = self._spare[self._begin : min(self._begin + len(piece), stop)]
            piece[: len(part)] = part
            self._begin += len(part)
        rest, need = _without_first(pieces, held), need - held
        while need > 0:  # spare is empty here
            got = self._receive([*rest, self._spare], deadline)
            self._begin, self._end = 0, max(0, got - need)
            rest, need = _without_first(rest, got), need - got

    def _expect_end(self, deadline: float) -> None:
        line = self.read_line(deadline)
        if line:
            raise self.unexpected_reply(line)

    def _receive(self, into: list[memoryview], deadline: float) -> int:
        self._sock.settimeout(seconds_left(deadline))
        got = self._sock.recvmsg_into(into)[0] if self._scatters else self._sock.recv_into(into[0])
        if not got:
            raise ConnectionResetError("it was closed by the server")
        return got


def command(*words: Piece) -> list[Piece]:
    """Return a command in RESP, as pieces to send. Does not copy the words."""
    pieces: list[Piece] = [b"*%d\r\n" % len(words)]
    for word in words:
        pieces += [b"$%d\r\n" % len(word), word, b"\r\n"]
    return pieces


def seconds_left(deadline: float) -> float:
    """Return the seconds until `deadline`. Raises TimeoutError if it is over."""
    seconds = deadline - time.monotonic()
    if seconds <= 0:
        raise TimeoutError("the server did not answer in time; see --remote-timeout")
    return seconds


def _small_pieces_joined(pieces: Iterable[Piece]) -> list[memoryview]:
    """Return the same bytes in fewer pieces."""
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


def _without_first(pieces: Sequence[memoryview], nbytes: int) -> list[memoryview]:
    """Return the pieces without their first `nbytes`. The first piece is not empty."""
    for index, piece in enumerate(pieces):
        if nbytes < len(piece):
            return [piece[nbytes:], *pieces[index + 1 :]]
        nbytes -= len(piece)
    return []


# -- connecting --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Tls:
    """Files in PEM format, read for every connection, so that certificates may be renewed while kvkern runs."""

    ca_file: str  # the authorities that may sign the server's certificate; empty: the system's
    cert_file: str  # the client's certificate; empty: none
    key_file: str  # its key; empty: in `cert_file`
    verify: bool  # False: any certificate will do

    def wrapped(self, sock: socket.socket, host: str) -> ssl.SSLSocket:
        """Return the socket with TLS. The handshake as a whole ends within the socket's timeout. Raises OSError."""
        context = ssl.create_default_context(cafile=self.ca_file or None)
        if not self.verify:
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        if self.cert_file:
            context.load_cert_chain(self.cert_file, self.key_file or None)
        return context.wrap_socket(sock, server_hostname=host)


@dataclass(frozen=True, slots=True)
class Dialer:
    """How to reach and log in to the servers of a store."""

    user: str = ""
    password: str = field(default="", repr=False)
    database: int = 0
    socket_path: str = ""  # a Unix socket, used for every address
    tls: Tls | None = None
    _dialled: weakref.WeakSet[Any] = field(default_factory=weakref.WeakSet, repr=False, compare=False)  # connections
    _interrupted: threading.Event = field(default_factory=threading.Event, repr=False, compare=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)  # of `_dialled`

    def dial(self, address: Address, deadline: float) -> Any:  # redis.Connection
        """Return a connected socket, not logged in. Raises RemoteError, or RefusedError if a user can correct the reason."""
        if self._interrupted.is_set():
            raise RemoteError("the store is being closed: no call is made now")
        try:
            connection = self._connection(address, deadline)
        except (OSError, ValueError) as error:
            raise self.failure(address, error) from error
        with self._lock:
            self._dialled.add(connection)
        try:
            # Without what redis-py says first: its waits have no common deadline.
            sock = connection._sock = connection._connect()  # set, so that `disconnect` closes it
            if self.tls is not None:
                sock.settimeout(seconds_left(deadline))
                connection._sock = self.tls.wrapped(sock, address[0])
        except (exceptions.RedisError, OSError, ValueError) as error:
            connection.disconnect()
            raise self.failure(address, error) from error
        return connection

    def interrupt(self) -> None:
        """End every connection, in whatever thread it waits, and open no other. See Interruptible."""
        self._interrupted.set()
        with self._lock:
            connections = list(self._dialled)
        for connection in connections:
            sock = connection._sock  # None: it is not connected yet, or not any more
            if sock is not None:
                with suppress(OSError):  # it has ended already
                    socket.socket.shutdown(sock, socket.SHUT_RDWR)

    def server_name(self, address: Address) -> str:
        """Return the name of a server for messages."""
        return self.socket_path or format_address(*address)

    def _connection(self, address: Address, deadline: float) -> Any:
        seconds = seconds_left(deadline)
        options: dict[str, Any] = {
            "protocol": 2, "retry": Retry(NoBackoff(), 0), "socket_timeout": seconds,
        }  # fmt: skip
        if self.socket_path:
            return UnixDomainSocketConnection(path=self.socket_path, **options, socket_connect_timeout=seconds)
        host, port = address
        addresses = socket.getaddrinfo(host, port, 0, socket.SOCK_STREAM)  # each address gets a share of the time
        options |= {
            "host": host, "port": port, "socket_connect_timeout": seconds / len(addresses),
            "socket_keepalive": True, "socket_keepalive_options": _KEEPALIVE,
        }  # fmt: skip
        return Connection(**options)

    def failure(self, address: Address, error: BaseException) -> RemoteError:
        """Make the error for a connection that could not be opened."""
        name, said = self.server_name(address), f"{error}"[:200]
        for cause in _causes(error):
            if isinstance(cause, ssl.SSLCertVerificationError):
                return RefusedError(
                    f"The certificate of {name} does not verify ({cause.verify_message}). Name the authority that signed "
                    f"it with ca_file=PATH, or use a host name that the certificate is for"
                )
            if isinstance(cause, ssl.SSLError) and not isinstance(cause, ssl.SSLEOFError | ssl.SSLZeroReturnError):
                return RefusedError(
                    f"The TLS handshake with {name} failed ({cause.reason or cause}). Check that the port is its TLS port, "
                    f"and check ca_file, cert_file and key_file"
                )
        return RemoteError(f"{name} cannot be reached: {said}{self._hint(error)}")

    def _hint(self, error: BaseException) -> str:
        """Guess the reason: a server that is spoken to in the wrong way hangs up or waits, and seldom says why."""
        causes = list(_causes(error))
        late = any(isinstance(cause, TimeoutError) for cause in causes)
        if self.socket_path or isinstance(causes[-1], ConnectionRefusedError | socket.gaierror):
            return ""
        if self.tls is None:
            return "" if late else ". If it wants TLS, say rediss:// or valkeys://"
        if late:
            return ". If it does not speak TLS, say redis:// or valkey://"
        return "" if self.tls.cert_file else ". If it wants a client certificate, give cert_file and key_file"


def _causes(error: BaseException | None) -> Iterable[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


_REMEDIES = {  # by the first word of an error that a user can correct
    "NOAUTH": "{name} refuses the login ({said}). Give user and password: scheme://user:password@host, or password_file",
    "WRONGPASS": "{name} refuses the login ({said}). Correct user and password of the URL",
    "NOPERM": "{name} gives too few rights ({said}). On the server say: ACL SETUSER <user> +get +set +exists +unlink "
    "~<prefix>kvkern*, and in a cluster +cluster|slots",
    "READONLY": "{name} is a replica ({said}). Name its master",
    "MOVED": "{name} belongs to a cluster ({said}). Say redis+cluster:// (rediss+cluster:// with TLS)",
}


def login_refused(name: str, line: bytes, password: str) -> RemoteError:
    """Make the exception for an error reply to AUTH. It never shows the password, even if the server does."""
    said = _said(line).replace(password, "***") if password else _said(line)
    if said.partition(" ")[0] not in ("WRONGPASS", "NOAUTH", "ERR") or is_turned_away(line):
        return error_reply(name, b"-%s" % said.encode())
    return RefusedError(_REMEDIES["WRONGPASS" if password else "NOAUTH"].format(name=name, said=said))


def is_turned_away(line: bytes) -> bool:
    """Return True if a server says, whatever it was asked, that it takes no connection."""
    return line.startswith((b"-ERR max number of clients", b"-DENIED"))


def _said(line: bytes) -> str:
    """Return an error reply for a message: no control characters, at most 200 letters."""
    return "".join(letter if letter.isprintable() else "?" for letter in line[1:].decode(errors="replace")[:200])


def error_reply(name: str, line: bytes) -> RemoteError:
    """Make the exception for an error reply, `-WORD what is wrong`."""
    said = _said(line)
    word = said.partition(" ")[0]
    if word in _REMEDIES:
        return RefusedError(_REMEDIES[word].format(name=name, said=said))
    if said.startswith("ERR unknown command"):
        return RefusedError(f"{name} is neither Redis 4 or later nor Valkey ({said}). Use such a server")
    if "cluster support disabled" in said:
        return RefusedError(f"{name} is not a cluster ({said}). Say redis:// (rediss:// with TLS)")
    return RemoteError(f"{name} says: {said}")
