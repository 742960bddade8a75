"""A store in memory, for tests of the tier. Tests switch its faults on."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from kvkern.remote.stores.base import Got, Parts, RemoteError


class MemoryStore:
    """`RemoteStore` over a dict that several stores may share."""

    def __init__(self, values: dict[bytes, bytes] | None = None) -> None:
        self.values = {} if values is None else values
        self.delay_s = 0.0  # of every call
        self.broken = False  # every call raises
        self.full = False  # no value is taken
        self.gate: asyncio.Event | None = None  # set: calls wait for it
        self.calls: list[tuple[str, int]] = []  # (kind, number of keys)

    async def open(self) -> None:
        await self._called("open", 0)

    async def close(self) -> None:
        self.calls.append(("close", 0))

    async def register(self, memory: memoryview) -> None:
        self.calls.append(("register", len(memory)))

    async def exists(self, keys: Sequence[bytes], timeout_s: float) -> list[bool]:
        await self._called("exists", len(keys))
        return [key in self.values for key in keys]

    async def get(self, keys: Sequence[bytes], into: Sequence[Parts], timeout_s: float) -> list[Got]:
        await self._called("get", len(keys))
        result = []
        for key, (header, payload) in zip(keys, into, strict=True):
            value = self.values.get(key)
            if value is None:
                result.append(Got.MISS)
            elif len(value) != len(header) + len(payload):
                result.append(Got.WRONG_SIZE)
            else:
                header[:], payload[:] = value[: len(header)], value[len(header) :]
                result.append(Got.HIT)
        return result

    async def put(self, keys: Sequence[bytes], values: Sequence[Parts], timeout_s: float) -> list[bool]:
        await self._called("put", len(keys))
        if self.full:
            return [False] * len(keys)
        for key, (header, payload) in zip(keys, values, strict=True):
            self.values[key] = bytes(header) + bytes(payload)
        return [True] * len(keys)

    async def delete(self, keys: Sequence[bytes], timeout_s: float) -> None:
        await self._called("delete", len(keys))
        for key in keys:
            self.values.pop(key, None)

    async def _called(self, what: str, count: int) -> None:
        self.calls.append((what, count))
        if self.delay_s:
            await asyncio.sleep(self.delay_s)
        if self.gate is not None:
            await self.gate.wait()
        if self.broken:
            raise RemoteError("broken on purpose")
