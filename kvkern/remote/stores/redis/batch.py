"""The keys of one call on their way: several connections take from them, pipelined within a window, and note what came back.

    while a key is left or a reply is owed:
        less than half a window on the wire: send what fills it
        read one reply

A window bounds what a server has to hold in replies that nobody has read yet, and lets two sides that only write never
wait for each other. Knows what is asked and answered; knows nothing of servers and their addresses.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from ..base import Got, Parts, RemoteError
from .connection import Address, Piece, RedisConnection, command, refusal

WINDOW_NBYTES = 4 << 20  # per connection; measured: 2 to 16 MiB are as good, 32 MiB over all leave the CPU's cache
_LEAST_NBYTES = WINDOW_NBYTES >> 10  # a command counts for at least that: 1024 in a window
_ASKING = b"".join(bytes(piece) for piece in command(b"ASKING"))

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Redirect:
    """A cluster's answer: this key is elsewhere, for good or (asking) just now."""

    index: int
    address: Address
    asking: bool


class KeyBatch(ABC, Generic[T]):
    """Keys, and what is known of each."""

    unasked: T  # what a key is that was not asked for, since it need not be
    unanswered: T  # and one that was, in vain
    partly = True  # whether answers are good although others failed

    def __init__(self, names: Sequence[bytes]) -> None:
        self.names = names
        self.found: list[T | None] = [None] * len(names)
        self.stop = len(names)  # what is behind it is not asked for
        self.cluster = False  # whether redirections are taken
        self.redirects: list[Redirect] = []  # to be asked again, once
        self.redirected = False  # and that is now

    def cost(self, index: int) -> int:
        """Bytes that a key puts on the wire, one way or the other."""
        return _LEAST_NBYTES

    @abstractmethod
    def request(self, index: int) -> list[Piece]:
        """What to send for a key."""

    @abstractmethod
    def accept(self, index: int, line: bytes, link: RedisConnection, deadline: float) -> bool:
        """Take a reply that begins with this line. False: this server need not be asked for more."""

    def refuse(self, index: int, line: bytes, link: RedisConnection) -> bool:
        """Take an error reply, as `accept` does. Raises RemoteError."""
        word, _, rest = line[1:].partition(b" ")
        if word in (b"MOVED", b"ASK"):
            if not self.cluster:
                raise refusal(link.name, line)
            if self.redirected:
                raise RemoteError(f"{link.name} redirects a second time: the cluster is being changed")
            self.redirects.append(Redirect(index, _address(rest, link), word == b"ASK"))
            return True
        raise refusal(link.name, line)

    def outcome(self, errors: Sequence[Exception]) -> list[T]:
        """One answer for every key. Raises the first error, if it left nothing of use."""
        useful = self.partly and any(found is not None for found in self.found)
        if errors and None in self.found and not useful:
            raise errors[0]
        failed = self.unanswered if errors else self.unasked
        rest = [failed if index < self.stop else self.unasked for index in range(len(self.found))]
        return [rest[index] if found is None else found for index, found in enumerate(self.found)]


class GetBatch(KeyBatch[Got]):
    """Values into memory."""

    unasked = Got.MISS
    unanswered = Got.UNKNOWN

    def __init__(self, names: Sequence[bytes], into: Sequence[Parts]) -> None:
        super().__init__(names)
        self._into = into

    def cost(self, index: int) -> int:
        return max(_LEAST_NBYTES, sum(map(len, self._into[index])))

    def request(self, index: int) -> list[Piece]:
        return command(b"GET", self.names[index])

    def accept(self, index: int, line: bytes, link: RedisConnection, deadline: float) -> bool:
        nbytes, pieces = link.length(line), self._into[index]
        if nbytes is None:
            self.found[index] = Got.MISS
            self.stop = min(self.stop, index)
        elif nbytes == sum(map(len, pieces)):
            link.read(pieces, deadline)
            self.found[index] = Got.HIT
        else:
            link.skip(nbytes, deadline)
            self.found[index] = Got.WRONG_SIZE
        return nbytes is not None


class PutBatch(KeyBatch[bool | None]):
    """Values from memory."""

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

    def accept(self, index: int, line: bytes, link: RedisConnection, deadline: float) -> bool:
        if line != b"+OK":
            raise link.surprise(line)
        self.found[index] = True
        return True

    def refuse(self, index: int, line: bytes, link: RedisConnection) -> bool:
        if not line.startswith(b"-OOM "):
            return super().refuse(index, line, link)
        self.found[index] = False
        return False  # values that come behind would find it as full


class AskBatch(KeyBatch[bool | None]):
    """EXISTS or UNLINK, key by key: a cluster takes no more in one command."""

    unasked = unanswered = None

    def __init__(self, names: Sequence[bytes], verb: bytes) -> None:
        super().__init__(names)
        self._verb = verb
        self.partly = verb == b"EXISTS"

    def request(self, index: int) -> list[Piece]:
        return command(self._verb, self.names[index])

    def accept(self, index: int, line: bytes, link: RedisConnection, deadline: float) -> bool:
        if line not in (b":0", b":1"):
            raise link.surprise(line)
        self.found[index] = line == b":1"
        return True


@dataclass(frozen=True, slots=True)
class ConnectionShare:
    """What one server is asked for, by one connection or several."""

    batch: KeyBatch[Any]
    queue: deque[int]  # indices, in the order of the keys
    window_nbytes: int
    deadline: float
    asking: bool = False  # redirected: the server answers only if told so

    def drive(self, link: RedisConnection) -> None:
        """Until none is left. Raises RemoteError; after OSError the keys that are owed are back in the queue."""
        owed: deque[int] = deque()
        try:
            self._drive(link, owed)
        except OSError:
            self.queue.extendleft(reversed(owed))
            raise

    def _drive(self, link: RedisConnection, owed: deque[int]) -> None:
        batch, on_wire = self.batch, 0
        while True:
            if on_wire <= self.window_nbytes // 2:
                pieces: list[Piece] = []
                while on_wire < self.window_nbytes and (index := self._next()) is not None:
                    owed.append(index)
                    on_wire += batch.cost(index)
                    pieces += [_ASKING, *batch.request(index)] if self.asking else batch.request(index)
                link.send(pieces, self.deadline)
            if not owed:
                return
            line = link.line(self.deadline)
            if self.asking:
                if line != b"+OK":
                    raise refusal(link.name, line)
                line = link.line(self.deadline)
            if line[:1] == b"-":
                go_on = batch.refuse(owed[0], line, link)
            else:
                go_on = batch.accept(owed[0], line, link, self.deadline)
            on_wire -= batch.cost(owed.popleft())
            if not go_on:
                self.queue.clear()

    def _next(self) -> int | None:
        try:
            index = self.queue.popleft()
        except IndexError:
            return None
        return index if index < self.batch.stop else None


def _address(rest: bytes, link: RedisConnection) -> Address:
    """Of `3999 127.0.0.1:6381`; without a host it is the one that was asked."""
    host, _, port = rest.partition(b" ")[2].decode(errors="replace").rpartition(":")
    if not (port.isascii() and port.isdigit() and 0 < int(port) < 1 << 16):
        raise link.surprise(rest)
    return host or link.address[0], int(port)
