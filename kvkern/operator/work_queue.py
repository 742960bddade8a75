"""Keys that wait for a pass: each once, one pass at a time for a key, later again if it fails, and not too many at once."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Hashable
from typing import Generic, TypeVar

logger = logging.getLogger("kvkern")

Key = TypeVar("Key", bound=Hashable)
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 60.0


class WorkQueue(Generic[Key]):
    """Use it in one event loop. `work` gets a key. It returns None, or the seconds until the key may be tried again."""

    def __init__(self, work: Callable[[Key], Awaitable[float | None]], at_once: int = 8) -> None:
        self._work, self._places = work, asyncio.Semaphore(at_once)
        self._tasks: dict[Key, asyncio.Task[None]] = {}
        self._again: dict[Key, asyncio.Event] = {}
        self._failures: dict[Key, int] = {}

    def add(self, key: Key) -> None:
        """Make a pass soon; if one is under way, another one after it."""
        self._again.setdefault(key, asyncio.Event()).set()
        if key not in self._tasks:
            task = self._tasks[key] = asyncio.get_running_loop().create_task(self._run(key))
            task.add_done_callback(lambda ended: self._look_at(key, ended))

    def __len__(self) -> int:
        return len(self._tasks)

    async def close(self) -> None:
        """End all passes."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _look_at(self, key: Key, ended: asyncio.Task[None]) -> None:
        """Say what a pass has stumbled over, which is a fault of ours, and try again later. Other keys go on."""
        if not ended.cancelled() and (error := ended.exception()) is not None:
            logger.error(
                "kvkern: a pass has failed: %(error)r", {"event": "pass_fault", "error": error}, exc_info=error
            )
            asyncio.get_running_loop().call_later(LONGEST_PAUSE_S, self.add, key)

    async def _run(self, key: Key) -> None:
        again = self._again[key]
        try:
            while again.is_set():
                again.clear()
                async with self._places:
                    pause_s = await self._work(key)
                if pause_s is None:
                    self._failures.pop(key, None)
                    continue
                failures = self._failures[key] = self._failures.get(key, 0) + 1
                backoff_s = min(FIRST_PAUSE_S * 2 ** min(failures - 1, 10), LONGEST_PAUSE_S)
                try:  # an event ends the pause, but not a pause that the server has asked for
                    await asyncio.sleep(pause_s)
                    await asyncio.wait_for(again.wait(), max(0.0, backoff_s - pause_s))
                except TimeoutError:
                    again.set()
        finally:
            del self._tasks[key]
            if not again.is_set():
                self._again.pop(key, None)
