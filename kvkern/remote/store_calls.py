"""Calls of the tier to its store, and what they say of it: to the breaker, and to requests that would wait for it.

    answered                  it works, and nothing of this kind is stalled any more
    answered in part, soon    neither good nor bad: one server of many has failed
    answered in part, late    it fails: a server of many hangs, and every call would wait for it
    an error, no answer       it fails
    not yet, after `late_s`   it is stalled, until this call ends or another of its kind is answered

Knows no request. Of the tier's loop, but for `stalled`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

from ..errors import KvkernError
from ..metrics import CacheCounters
from .circuit_breaker import CircuitBreaker
from .stores.base import Got, Parts, RemoteError, RemoteStore

LATE_SHARE = 0.5  # of the time that a call may take: an answer in part that took so long is a failure

A = TypeVar("A")
_Late = tuple[str, object]  # kind, call


class StoreCalls:
    """All of them raise RemoteError, and what a store with a bug raises."""

    def __init__(self, store: RemoteStore, breaker: CircuitBreaker, counters: CacheCounters, timeout_s: float) -> None:
        self._store, self._breaker, self._counters, self._timeout_s = store, breaker, counters, timeout_s
        self._late: set[_Late] = set()
        self.closed = False  # nothing is asked any more

    @property
    def stalled(self) -> bool:
        """Whether a call of somebody's leaves him waiting, and none has been answered since."""
        return bool(self._late)

    async def exists(self, keys: Sequence[bytes], late_s: float | None = None) -> Sequence[bool | None]:
        """See RemoteStore. With `late_s` it may become stalled."""
        there = await self._call("exists", lambda: self._store.exists(keys, self._timeout_s), None, late_s)
        if len(there) != len(keys):  # who asks for more until it knows all would never end
            raise RemoteError(f"the store has answered {len(there)} times to {len(keys)} keys")
        return there

    async def get(self, keys: Sequence[bytes], into: Sequence[Parts], late_s: float) -> Sequence[Got]:
        """See RemoteStore."""
        return await self._call("get", lambda: self._store.get(keys, into, self._timeout_s), Got.UNKNOWN, late_s)

    async def put(self, keys: Sequence[bytes], values: Sequence[Parts]) -> Sequence[bool | None]:
        """See RemoteStore."""
        return await self._call("put", lambda: self._store.put(keys, values, self._timeout_s), None)

    async def delete(self, keys: Sequence[bytes]) -> None:
        """See RemoteStore."""

        async def delete() -> Sequence[bool]:
            await self._store.delete(keys, self._timeout_s)
            return ()

        await self._call("delete", delete, None)

    async def _call(
        self,
        kind: str,
        call: Callable[[], Awaitable[Sequence[A]]],
        unanswered: object,  # what an answer is that is none
        late_s: float | None = None,
    ) -> Sequence[A]:
        if self.closed or not self._breaker.begin():
            raise RemoteError("the store is not asked any more, or not now")
        began, mine = time.monotonic(), (kind, object())
        timer = None if late_s is None else asyncio.get_running_loop().call_later(late_s, self._late.add, mine)
        try:
            answers = await call()
            open_keys = sum(answer is unanswered for answer in answers)
            if open_keys and open_keys == len(answers):
                raise RemoteError("no key was answered")
        except BaseException as error:
            self._counters.remote_failures += 1
            self._breaker.failed(error)
            if isinstance(error, KvkernError):  # it was good enough at the start
                raise RemoteError(str(error)) from error
            raise
        finally:
            if timer is not None:
                timer.cancel()
            self._late.discard(mine)
        if not open_keys:
            self._breaker.succeeded()
            self._late -= {late for late in self._late if late[0] == kind}  # in place: timers hold the set
            return answers
        self._counters.remote_failures += 1
        if time.monotonic() - began < LATE_SHARE * self._timeout_s:
            self._breaker.partly()
        else:
            self._breaker.failed(f"{open_keys} of {len(answers)} keys were not answered in time")
        return answers
