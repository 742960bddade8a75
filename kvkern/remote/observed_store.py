"""A remote store whose calls are measured: how long each took, and how many bytes it moved. Adds nothing else to the store."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Sequence
from typing import TypeVar

from ..metrics import Meter
from .stores.base import Got, Interruptible, Parts, RemoteStore

T = TypeVar("T")


def observed_store(store: RemoteStore, meter: Meter) -> RemoteStore:
    """Return the store, measured by `meter`. It can be interrupted if the store can."""
    return _ObservedInterruptible(store, meter) if isinstance(store, Interruptible) else ObservedStore(store, meter)


class ObservedStore:
    """A `RemoteStore` around another one. A call that fails counts with the time until it failed, and moves no bytes."""

    def __init__(self, store: RemoteStore, meter: Meter) -> None:
        self._store, self._meter = store, meter

    async def open(self) -> None:
        """See RemoteStore."""
        await self._store.open()

    async def close(self) -> None:
        """See RemoteStore."""
        await self._store.close()

    async def register(self, memory: memoryview) -> None:
        """See RemoteStore."""
        await self._store.register(memory)

    async def exists(self, keys: Sequence[bytes], timeout_s: float) -> Sequence[bool | None]:
        """See RemoteStore."""
        there, _ = await self._timed("exists", self._store.exists(keys, timeout_s))
        return there

    async def get(self, keys: Sequence[bytes], into: Sequence[Parts], timeout_s: float) -> Sequence[Got]:
        """See RemoteStore."""
        got, seconds = await self._timed("get", self._store.get(keys, into, timeout_s))
        self._moved("get", into, [outcome is Got.HIT for outcome in got], seconds)
        return got

    async def put(self, keys: Sequence[bytes], values: Sequence[Parts], timeout_s: float) -> Sequence[bool | None]:
        """See RemoteStore."""
        taken, seconds = await self._timed("put", self._store.put(keys, values, timeout_s))
        self._moved("put", values, taken, seconds)
        return taken

    async def delete(self, keys: Sequence[bytes], timeout_s: float) -> None:
        """See RemoteStore."""
        await self._timed("delete", self._store.delete(keys, timeout_s))

    async def _timed(self, op: str, call: Awaitable[T]) -> tuple[T, float]:
        began = time.perf_counter()
        try:
            answer = await call
        finally:
            seconds = time.perf_counter() - began
            self._meter.observe("remote_seconds", seconds, op)
        return answer, seconds

    def _moved(self, op: str, values: Sequence[Parts], moved: Sequence[bool | None], seconds: float) -> None:
        nbytes = sum(header.nbytes + body.nbytes for (header, body), ok in zip(values, moved, strict=False) if ok)
        if nbytes:
            self._meter.add("remote_bytes", nbytes, op)
            self._meter.observe("remote_bytes_per_second", nbytes / max(seconds, 1e-9), op)


class _ObservedInterruptible(ObservedStore):
    """An observed store that can end its calls early."""

    def interrupt(self) -> None:
        """See Interruptible."""
        assert isinstance(self._store, Interruptible)
        self._store.interrupt()
