"""Threads of a store whose client blocks: the calls of a loop run there, and are never left behind."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


class BlockingCalls:
    """A pool for blocking calls."""

    def __init__(self, count: int, name: str) -> None:
        self._pool = ThreadPoolExecutor(count, thread_name_prefix=f"kvkern-{name}")

    async def run(self, call: Callable[[], T]) -> T:
        """What `call` returns or raises. Cancelled, it still waits: memory of the caller is in use until the end."""
        future = asyncio.get_running_loop().run_in_executor(self._pool, call)
        cancelled: asyncio.CancelledError | None = None
        while not future.done():
            try:
                await asyncio.wait({future})
            except asyncio.CancelledError as error:
                cancelled = error
        if cancelled is not None:
            future.exception()  # looked at, so that asyncio does not report it
            raise cancelled
        return future.result()

    def close(self) -> None:
        """Wait for calls under way and end the threads."""
        self._pool.shutdown(wait=True, cancel_futures=True)
