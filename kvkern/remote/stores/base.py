"""What the remote tier asks of a store. Knows no store.

    put(keys, values)     write values, as long as the store has room
    get(keys, buffers)    read the values that are there into the caller's memory
    exists, delete        many keys at once

A value is a header and a payload, two pieces of memory one behind the other (value_format.py). A store moves them without
joining them. The caller gives all sizes: a value of another size is no value. Stores know only keys and bytes; the tier
verifies the bytes.

If some servers of a store have failed, a call says so key by key, with UNKNOWN or None. Such a key is neither there nor
absent, and the tier concludes nothing from it. A call that has no answer for any key raises.

A store is used from one event loop. Blocking calls run in threads of the store. Memory that was passed in belongs to the
call until it returns or raises, even if the caller has stopped waiting. So the tier never cancels a call, and a call ends
by itself soon after `timeout_s`. Runtime failures are `RemoteError`. Mistakes that a user can correct are ConfigError.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import Protocol, TypeVar, runtime_checkable

VALUE_VERSION = 1

Parts = tuple[memoryview, memoryview]  # header, payload; each contiguous bytes

T = TypeVar("T")


class RemoteError(Exception):
    """A call to a store failed: the store is gone, slow or full, or it refused. The tier turns this into a miss."""


class Got(enum.IntEnum):
    """The outcome of one key of a `get`. The buffer holds the value after HIT, and undefined bytes otherwise."""

    HIT = 0
    MISS = 1  # not there; keys behind the first miss need not be read
    WRONG_SIZE = 2  # there, but of another size: not a value of this version and geometry
    UNKNOWN = 3  # not answered, its server has failed: the value may be there


class RemoteStore(Protocol):
    """The interface of a store. Calls may overlap."""

    async def open(self) -> None:
        """Connect. `close` follows, also if `open` raises.

        Raises ConfigError for what cannot work: no such bucket, wrong credentials, missing rights. Raises RemoteError if
        the store does not answer now; later calls connect by themselves.
        """

    async def close(self) -> None:
        """Close connections and end threads. No call follows."""

    async def register(self, memory: memoryview) -> None:
        """Learn the memory in which all large buffers will lie, for stores that move data by themselves.

        Called before the first transfer. Small buffers may lie elsewhere.
        """

    async def exists(self, keys: Sequence[bytes], timeout_s: float) -> Sequence[bool | None]:
        """Return for each key whether it is there, in one round trip if possible. None: not answered. Raises RemoteError."""

    async def get(self, keys: Sequence[bytes], into: Sequence[Parts], timeout_s: float) -> Sequence[Got]:
        """Read values into memory, in the order of the keys. Raises RemoteError; the buffers hold undefined bytes then."""

    async def put(self, keys: Sequence[bytes], values: Sequence[Parts], timeout_s: float) -> Sequence[bool | None]:
        """Write values. Returns for each key: True, it is there now; False, there is no room; None, not answered.

        A value that was there stays or is replaced. A value that was not answered may have been written.

        A reader sees a whole value or none. Raises RemoteError; some values may have been written then.
        """

    async def delete(self, keys: Sequence[bytes], timeout_s: float) -> None:
        """Delete values. A key that is not there is no error. Raises RemoteError."""


@runtime_checkable
class Interruptible(Protocol):
    """A store that can end its calls early."""

    def interrupt(self) -> None:
        """Make the calls under way, and all later ones, fail soon with RemoteError. Never blocks. Safe to call twice."""


def checked_answers(answers: list[T | None], errors: Sequence[RemoteError]) -> list[T | None]:
    """Return `answers`; None: the key was not answered. Raises the first error if no key was answered."""
    if errors and all(answer is None for answer in answers):
        raise errors[0]
    return answers


def checked_get_answers(answers: list[Got | None], errors: Sequence[RemoteError]) -> list[Got]:
    """Return the outcomes of a `get` that stops at the first miss: unanswered keys before it are UNKNOWN, behind it MISS.

    Raises the first error if no key was answered.
    """
    end = next((row for row, got in enumerate(answers) if got is Got.MISS), len(answers))
    rest = [Got.UNKNOWN if row < end else Got.MISS for row in range(len(answers))]
    return [rest[row] if got is None else got for row, got in enumerate(checked_answers(answers, errors))]


def value_name(key: bytes) -> str:
    """Return the name of a chunk's value, for stores that have names. Values of another version have other names."""
    return f"kvkern{VALUE_VERSION}/{key.hex()}"
