"""What the remote tier asks of a store, and how a URL becomes one. Knows no store.

    put(keys, values)     every value, as far as there is room
    get(keys, buffers)    into the caller's memory, as far as they are there
    exists, delete        of many at once

A value is a header and a payload, two pieces of memory one behind the other (value.py): a store moves them without
joining them. All sizes are the caller's: a value of another size is no value. Stores know keys and bytes; what is in
them, the tier verifies.

A call over many servers, of which some have failed, says so key by key: UNKNOWN, or None. Such a key is neither there nor
absent, and the tier draws no conclusion from it. A call that has no answer for any key raises.

A store is used from one event loop. Whatever blocks runs in threads of its own. Memory that was passed in belongs to
the call until it returns or raises, whatever becomes of the caller's patience: so the tier never cancels a call, and a
call ends by itself soon after `timeout_s`. Runtime failures are `RemoteError`; what a user can mend is ConfigError.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import Protocol, TypeVar

VALUE_VERSION = 1

Parts = tuple[memoryview, memoryview]  # header, payload; each contiguous bytes

T = TypeVar("T")


class RemoteError(Exception):
    """A store did not do what it was asked: gone, slow, full, or it says no. The tier makes a miss of it."""


class Got(enum.IntEnum):
    """What became of one key of a `get`. Buffers of all but HIT hold anything."""

    HIT = 0
    MISS = 1  # not there; behind the first one nothing needs to be read
    WRONG_SIZE = 2  # there, but of another size: no value of this version and geometry
    UNKNOWN = 3  # not answered: its server has failed; it may be there


class RemoteStore(Protocol):
    """One store. Calls may overlap."""

    async def open(self) -> None:
        """Connect; `close` follows, also if it raises.

        Raises ConfigError for what cannot work: no such bucket, wrong credentials, missing rights.

        RemoteError if nobody answers now; later calls connect by themselves.
        """

    async def close(self) -> None:
        """Give connections and threads back. Nothing is called afterwards."""

    async def register(self, memory: memoryview) -> None:
        """All buffers will lie in it, or be small: for stores that move data by themselves. Before the first transfer."""

    async def exists(self, keys: Sequence[bytes], timeout_s: float) -> Sequence[bool | None]:
        """Which of them are there, in one round trip if the store can. None: not answered. Raises RemoteError."""

    async def get(self, keys: Sequence[bytes], into: Sequence[Parts], timeout_s: float) -> Sequence[Got]:
        """Read values into memory, in the order of the keys. Raises RemoteError: then the buffers hold anything."""

    async def put(self, keys: Sequence[bytes], values: Sequence[Parts], timeout_s: float) -> Sequence[bool | None]:
        """Write values; which of them are there now. One that was there stays or is replaced. False: no room.

        None: not answered, and perhaps written.

        A reader sees a whole value or none. Raises RemoteError: then some may have been written.
        """

    async def delete(self, keys: Sequence[bytes], timeout_s: float) -> None:
        """Forget values; those that are not there are no error. Raises RemoteError."""


def answered(answers: list[T | None], errors: Sequence[RemoteError]) -> list[T | None]:
    """These, of which None are the keys that were not answered. Raises the first error if it left no answer."""
    if errors and all(answer is None for answer in answers):
        raise errors[0]
    return answers


def answered_get(answers: list[Got | None], errors: Sequence[RemoteError]) -> list[Got]:
    """Likewise of a `get` that does not read what is behind the first miss."""
    end = next((row for row, got in enumerate(answers) if got is Got.MISS), len(answers))
    rest = [Got.UNKNOWN if row < end else Got.MISS for row in range(len(answers))]
    return [rest[row] if got is None else got for row, got in enumerate(answered(answers, errors))]


def value_name(key: bytes) -> str:
    """What a chunk's value is called in stores that have names: another version's values have other names."""
    return f"kvkern{VALUE_VERSION}/{key.hex()}"
