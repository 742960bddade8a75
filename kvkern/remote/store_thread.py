"""A store and the one thread that calls it, with an event loop. It is opened once, perhaps before there is an arena."""

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
    """Call `open` first, then `run` from any thread. Close the store before `stop` ends the thread; `close` does both."""

    def __init__(self, store: RemoteStore) -> None:
        self.store = store
        self.loop = asyncio.new_event_loop()
        self.open_failure = (
            ""  # why the store did not answer to `open`; empty: it did. Later calls connect by themselves
        )
        self._thread = threading.Thread(target=self._run, name="kvkern-remote", daemon=True)

    @property
    def alive(self) -> bool:
        """True while the thread runs."""
        return self._thread.is_alive()

    def open(self, timeout_s: float = OPEN_S) -> None:
        """Start the thread and open the store, unless that was done before.

        Raises ConfigError for a mistake that the user has to correct; the thread has ended then.
        """
        if self.alive:
            return
        self._thread.start()
        try:
            self.run(self._open(timeout_s))
        except BaseException:
            self.close()
            raise

    def run(self, call: Coroutine[Any, Any, T]) -> T:
        """Run `call` on the store's thread. Returns its result or raises its exception."""
        return asyncio.run_coroutine_threadsafe(call, self.loop).result()

    def close(self) -> None:
        """Close the store and end the thread; a RemoteError while closing is only logged.

        Call this if the store was never handed to a running tier.
        """
        try:
            self.run(self.store.close())
        except RemoteError as error:
            logger.debug(
                "kvkern: a remote store was not closed properly: %(error)s",
                {"event": "remote_not_closed", "error": error},
            )
        finally:
            self.stop()

    def stop(self) -> None:
        """End the thread. The store must be closed, and no call under way."""
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()

    async def _open(self, timeout_s: float) -> None:
        try:
            async with asyncio.timeout(timeout_s):
                await self.store.open()
        except (RemoteError, TimeoutError) as error:
            self.open_failure = str(error) or f"no answer for {timeout_s:.0f} s"

    def _run(self) -> None:
        asyncio.set_event_loop(self.loop)
        self.loop.run_forever()
