"""A store and the thread that alone calls it, by an event loop. Opened once, perhaps before there is an arena."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Coroutine
from typing import Any, TypeVar

from .stores.base import RemoteError, RemoteStore

logger = logging.getLogger("kvkern")

OPEN_S = 20.0

T = TypeVar("T")


class StoreThread:
    """`open`, then `run` from any thread; `stop` ends the thread. The store is closed before that, by `close` or a call."""

    def __init__(self, store: RemoteStore) -> None:
        self.store = store
        self.loop = asyncio.new_event_loop()
        self.failure = ""  # why nobody has answered to `open`; later calls connect by themselves
        self._thread = threading.Thread(target=self._run, name="kvkern-remote", daemon=True)

    @property
    def alive(self) -> bool:
        """Whether there is a thread."""
        return self._thread.is_alive()

    def open(self, timeout_s: float = OPEN_S) -> None:
        """Raises ConfigError for what the user has to mend; nothing is left then. Nothing if it is open already."""
        if self.alive:
            return
        self._thread.start()
        try:
            self.run(self._open(timeout_s))
        except BaseException:
            self.close()
            raise

    def run(self, call: Coroutine[Any, Any, T]) -> T:
        """What it returns or raises, in the thread."""
        return asyncio.run_coroutine_threadsafe(call, self.loop).result()

    def close(self) -> None:
        """Close the store, as well as that goes, and end the thread. For who has not given it to a tier that has started."""
        try:
            self.run(self.store.close())
        except RemoteError as error:
            logger.debug("kvkern: a remote store does not close: %s", error)
        finally:
            self.stop()

    def stop(self) -> None:
        """End the thread. Nothing is under way, and the store is closed."""
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()

    async def _open(self, timeout_s: float) -> None:
        try:
            async with asyncio.timeout(timeout_s):
                await self.store.open()
        except (RemoteError, TimeoutError) as error:
            self.failure = str(error) or f"no answer for {timeout_s:.0f} s"

    def _run(self) -> None:
        asyncio.set_event_loop(self.loop)
        self.loop.run_forever()
