"""The keys of one call. Several connections take keys from it, pipeline them within a window, and note the replies.

    while a key is left or a reply is owed:
        at most half a window on the wire: send commands until it is full
        read one reply

A window bounds the unread replies that a server has to hold. It also keeps the two sides from waiting for each other while
both only write. Knows commands and replies; knows nothing of servers and their addresses.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from ..base import Got, Parts, RemoteError
from .connection import Address, Piece, RedisConnection, command, error_reply

WINDOW_NBYTES = (
    4 << 20
)  # per connection; measured: 2 to 16 MiB are as good; 32 MiB over all connections leave the CPU's cache
_LEAST_NBYTES = WINDOW_NBYTES >> 10  # a command counts for at least this: 1024 commands in a window
_ASKING = b"".join(bytes(piece) for piece in command(b"ASKING"))

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Redirect:
    """A cluster's reply: another server has this key, for good or (asking) only now."""

    index: int
    address: Address
    asking: bool


class KeyBatch(ABC, Generic[T]):
    """The keys of a call, and the answer for each."""

    unasked: T  # the answer for a key that need not be asked for
    unanswered: T  # the answer for a key whose server gave none
    partial_is_useful = True  # False: the call fails if any key was not answered

    def __init__(self, names: Sequence[bytes]) -> None:
        self.names = names
        self.found: list[T | None] = [None] * len(names)  # answers; None: none yet
        self.stop = len(names)  # keys from here on are not asked for
        self.cluster = False  # set: follow redirections
        self.redirects: list[Redirect] = []  # keys to ask again, once
        self.redirected = False  # set while they are asked again

    def cost(self, index: int) -> int:
        """Return the bytes that a key puts on the wire, in its command or its reply."""
        return _LEAST_NBYTES

    @abstractmethod
    def request(self, index: int) -> list[Piece]:
        """Return the command for a key."""

    @abstractmethod
    def accept(self, index: int, line: bytes, connection: RedisConnection, deadline: float) -> bool:
        """Take a reply that begins with `line`. Returns False if this server need not be asked for more keys."""

    def refuse(self, index: int, line: bytes, connection: RedisConnection) -> bool:
        """Take an error reply, as `accept` does. Raises RemoteError."""
        word, _, rest = line[1:].partition(b" ")
        if word in (b"MOVED", b"ASK"):
            if not self.cluster:
                raise error_reply(connection.name, line)
            if self.redirected:
                raise RemoteError(
                    f"{connection.name} redirects a key a second time: the cluster moves its slots; try again when it is done"
                )
            self.redirects.append(Redirect(index, _address(rest, connection), word == b"ASK"))
            return True
        raise error_reply(connection.name, line)

    def outcome(self, errors: Sequence[Exception]) -> list[T]:
        """Return one answer for every key. Raises the first error if no useful answer is left."""
        useful = self.partial_is_useful and any(found is not None for found in self.found)
        if errors and None in self.found and not useful:
            raise errors[0]
        failed = self.unanswered if errors else self.unasked
        rest = [failed if index < self.stop else self.unasked for index in range(len(self.found))]
        return [rest[index] if found is None else found for index, found in enumerate(self.found)]


class GetBatch(KeyBatch[Got]):
    """GET: values into memory."""

    unasked = Got.MISS
    unanswered = Got.UNKNOWN

    def __init__(self, names: Sequence[bytes], into: Sequence[Parts]) -> None:
        super().__init__(names)
        self._into = into

    def cost(self, index: int) -> int:
        return max(_LEAST_NBYTES, sum(map(len, self._into[index])))

    def request(self, index: int) -> list[Piece]:
        return command(b"GET", self.names[index])

    def accept(self, index: int, line: bytes, connection: RedisConnection, deadline: float) -> bool:
        nbytes, pieces = connection.bulk_length(line), self._into[index]
        if nbytes is None:
            self.found[index] = Got.MISS
            self.stop = min(self.stop, index)
        elif nbytes == sum(map(len, pieces)):
            connection.read_bulk(pieces, deadline)
            self.found[index] = Got.HIT
        else:
            connection.skip_bulk(nbytes, deadline)
            self.found[index] = Got.WRONG_SIZE
        return nbytes is not None


class PutBatch(KeyBatch[bool | None]):
    """SET: values from memory."""

    unasked = False
    unanswered = None

    def __init__(self, names: Sequence[bytes], values: Sequence[Parts], ttl_s: int) -> None:
        super().__init__(names)
        self._values = values
        self._tail = [b"EX", b"%d" % ttl_s] if ttl_s else []

    def cost(self, index: int) -> int:
        return max(_LEAST_NBYTES, sum(map(len, self._values[index])))

    def request(self, index: int) -> list[Piece]:
        header, payload = self._values[index]
        value = b"$%d\r\n" % (len(header) + len(payload))
        before, behind = (
            command(b"SET", self.names[index]),
            [b"$%d\r\n%s\r\n" % (len(word), word) for word in self._tail],
        )
        return [b"*%d\r\n" % (3 + len(self._tail)), *before[1:], value, header, payload, b"\r\n", *behind]

    def accept(self, index: int, line: bytes, connection: RedisConnection, deadline: float) -> bool:
        if line != b"+OK":
            raise connection.unexpected_reply(line)
        self.found[index] = True
        return True

    def refuse(self, index: int, line: bytes, connection: RedisConnection) -> bool:
        if not line.startswith(b"-OOM "):
            return super().refuse(index, line, connection)
        self.found[index] = False
        return False  # the next values would find the server full too


class AskBatch(KeyBatch[bool | None]):
    """EXISTS or UNLINK, key by key: in a cluster one command may only name keys of one slot."""

    unasked = unanswered = None

    def __init__(self, names: Sequence[bytes], verb: bytes) -> None:
        super().__init__(names)
        self._verb = verb
        self.partial_is_useful = verb == b"EXISTS"

    def request(self, index: int) -> list[Piece]:
        return command(self._verb, self.names[index])

    def accept(self, index: int, line: bytes, connection: RedisConnection, deadline: float) -> bool:
        if line not in (b":0", b":1"):
            raise connection.unexpected_reply(line)
        self.found[index] = line == b":1"
        return True


@dataclass(frozen=True, slots=True)
class ConnectionShare:
    """The keys that one server is asked for, over one connection or several."""

    batch: KeyBatch[Any]
    queue: deque[int]  # indices, in the order of the keys
    window_nbytes: int
    deadline: float
    asking: bool = False  # redirected with ASK: the server answers only after ASKING

    def drive(self, connection: RedisConnection) -> None:
        """Ask for keys until none is left.

        Raises RemoteError. After an OSError the unanswered keys are back in the queue.
        """
        owed: deque[int] = deque()
        try:
            self._drive(connection, owed)
        except OSError:
            self.queue.extendleft(reversed(owed))
            raise

    def _drive(self, connection: RedisConnection, owed: deque[int]) -> None:
        batch, on_wire = self.batch, 0
        while True:
            if on_wire <= self.window_nbytes // 2:
                pieces: list[Piece] = []
                while on_wire < self.window_nbytes and (index := self._next()) is not None:
                    owed.append(index)
                    on_wire += batch.cost(index)
                    pieces += [_ASKING, *batch.request(index)] if self.asking else batch.request(index)
                connection.send(pieces, self.deadline)
            if not owed:
                return
            line = connection.read_line(self.deadline)
            if self.asking:
                if line != b"+OK":
                    raise error_reply(connection.name, line)
                line = connection.read_line(self.deadline)
            if line[:1] == b"-":
                go_on = batch.refuse(owed[0], line, connection)
            else:
                go_on = batch.accept(owed[0], line, connection, self.deadline)
            on_wire -= batch.cost(owed.popleft())
            if not go_on:
                self.queue.clear()

    def _next(self) -> int | None:
        try:
            index = self.queue.popleft()
        except IndexError:
            return None
        return index if index < self.batch.stop else None


def _address(rest: bytes, connection: RedisConnection) -> Address:
    """Parse `3999 127.0.0.1:6381`. Without a host it is the host that was asked."""
    host, _, port = rest.partition(b" ")[2].decode(errors="replace").rpartition(":")
    if not (port.isascii() and port.isdigit() and 0 < int(port) < 1 << 16):
        raise connection.unexpected_reply(rest)
    return host or connection.address[0], int(port)
