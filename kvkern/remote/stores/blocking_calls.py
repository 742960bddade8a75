"""Threads for a store whose client blocks. The event loop waits for every call, also if the caller was cancelled."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


class BlockingCalls:
    """A thread pool for blocking calls."""

    def __init__(self, count: int, name: str) -> None:
        self._pool = ThreadPoolExecutor(count, thread_name_prefix=f"kvkern-{name}")

    async def run(self, call: Callable[[], T]) -> T:
        """Run `call` in a thread. Returns its result or raises its exception.

        If it is cancelled it still waits, because the call uses memory of the caller until its end.
        """
        future = asyncio.get_running_loop().run_in_executor(self._pool, call)
        try:
            await wait_until(future.done, lambda: asyncio.wait({future}))
        except asyncio.CancelledError:
            future.exception()  # read it, so that asyncio does not report it
            raise
        return future.result()

    def close(self) -> None:
        """Wait for the calls under way, then end the threads."""
        self._pool.shutdown(wait=True, cancel_futures=True)


async def wait_until(done: Callable[[], bool], wait: Callable[[], Awaitable[object]]) -> None:
    """Repeat `wait` until `done`, also if cancelled; the CancelledError is raised afterwards."""
    cancelled: asyncio.CancelledError | None = None
    while not done():
        try:
            await wait()
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        raise cancelled
