"""The tier's calls to its store. Their outcomes tell the breaker and later requests how the store is.

    a call was                       the store
    answered                         works; it is no longer stalled for calls of this kind
    answered in part, soon           neither works nor fails: one server of many has failed
    answered in part, late           fails: one server of many hangs, and every call would wait for it
    an error, or not answered        fails
    late, after `stalled_after_s`    is stalled until this call ends or another one of its kind is answered

Knows no request. Used on the tier's loop; `stalled` from any thread.
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

LATE_SHARE = 0.5  # of the timeout: an answer in part that took this share or more is a failure

A = TypeVar("A")
_Late = tuple[str, object]  # kind, call


class StoreCalls:
    """Every call raises RemoteError, and any exception that a store with a bug raises."""

    def __init__(self, store: RemoteStore, breaker: CircuitBreaker, counters: CacheCounters, timeout_s: float) -> None:
        self._store, self._breaker, self._counters, self._timeout_s = store, breaker, counters, timeout_s
        self._late: set[_Late] = set()
        self.closed = False  # set: every call raises RemoteError

    @property
    def stalled(self) -> bool:
        """True if a call is late and no call of its kind has been answered since."""
        return bool(self._late)

    async def exists(self, keys: Sequence[bytes], stalled_after_s: float | None = None) -> Sequence[bool | None]:
        """See RemoteStore. With `stalled_after_s` the store is marked as stalled if the call takes longer."""
        there = await self._call("exists", lambda: self._store.exists(keys, self._timeout_s), None, stalled_after_s)
        if len(there) != len(keys):  # a reader that asks until it knows all would never end
            raise RemoteError(
                f"The store gave {len(there)} answers for {len(keys)} keys. Report this to the author of the store"
            )
        return there

    async def get(self, keys: Sequence[bytes], into: Sequence[Parts], stalled_after_s: float) -> Sequence[Got]:
        """See RemoteStore."""
        return await self._call(
            "get", lambda: self._store.get(keys, into, self._timeout_s), Got.UNKNOWN, stalled_after_s
        )

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
        unanswered: object,  # the value that means: this key was not answered
        stalled_after_s: float | None = None,
    ) -> Sequence[A]:
        if self.closed or not self._breaker.begin_call():
            raise RemoteError("the store is closed or fails: no call is made now")
        began, mine = time.monotonic(), (kind, object())
        timer = (
            None
            if stalled_after_s is None
            else asyncio.get_running_loop().call_later(stalled_after_s, self._late.add, mine)
        )
        try:
            answers = await call()
            open_keys = sum(answer is unanswered for answer in answers)
            if open_keys and open_keys == len(answers):
                raise RemoteError(f"none of {len(answers)} keys was answered")
        except BaseException as error:
            self._counters.remote_failures += 1
            self._breaker.failed(error)
            if isinstance(error, KvkernError):  # the configuration was good enough at the start: this may pass
                raise RemoteError(str(error)) from error
            raise
        finally:
            if timer is not None:
                timer.cancel()
            self._late.discard(mine)
        if not open_keys:
            self._breaker.succeeded()
            self._late -= {late for late in self._late if late[0] == kind}  # in place: the timers hold this set
            return answers
        self._counters.remote_failures += 1
        if time.monotonic() - began < LATE_SHARE * self._timeout_s:
            self._breaker.partly_answered()
        else:
            self._breaker.failed(f"{open_keys} of {len(answers)} keys were not answered in time")
        return answers
