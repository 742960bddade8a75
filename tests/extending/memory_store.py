"""A dict as a remote store: `memory://NAME`, shared by everything in this process. The example of a store."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from .base import Got, Parts
from .url import RemoteUrl

_VALUES: defaultdict[str, dict[bytes, bytes]] = defaultdict(dict)  # host of the URL -> values


def make(url: RemoteUrl) -> MemoryStore:
    """The store of a URL. Raises ConfigError for an unknown option."""
    url.check_options()
    return MemoryStore(_VALUES[url.host])


class MemoryStore:
    """`RemoteStore` over a dict. Nothing blocks, and nothing fails."""

    def __init__(self, values: dict[bytes, bytes]) -> None:
        self._values = values

    async def open(self) -> None:
        """See RemoteStore."""

    async def close(self) -> None:
        """See RemoteStore."""

    async def register(self, memory: memoryview) -> None:
        """See RemoteStore."""

    async def exists(self, keys: Sequence[bytes], timeout_s: float) -> list[bool | None]:
        """See RemoteStore."""
        return [key in self._values for key in keys]

    async def get(self, keys: Sequence[bytes], into: Sequence[Parts], timeout_s: float) -> list[Got]:
        """See RemoteStore."""
        return [self._read(key, *parts) for key, parts in zip(keys, into, strict=True)]

    async def put(self, keys: Sequence[bytes], values: Sequence[Parts], timeout_s: float) -> list[bool | None]:
        """See RemoteStore."""
        self._values.update({key: b"".join(parts) for key, parts in zip(keys, values, strict=True)})
        return [True] * len(keys)

    async def delete(self, keys: Sequence[bytes], timeout_s: float) -> None:
        """See RemoteStore."""
        for key in keys:
            self._values.pop(key, None)

    def _read(self, key: bytes, header: memoryview, payload: memoryview) -> Got:
        value = self._values.get(key)
        if value is None:
            return Got.MISS
        if len(value) != len(header) + len(payload):
            return Got.WRONG_SIZE
        header[:], payload[:] = value[: len(header)], value[len(header) :]
        return Got.HIT
