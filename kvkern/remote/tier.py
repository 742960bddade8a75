"""The remote tier: reads chunks that DRAM lacks from a store, and writes chunks that DRAM has or evicts there, behind.

    extend   the missing part of a prefix:    known absent? -> exists -> worth it? -> windows: grant, get, verify, promote
    write    the most valuable of the outbox: exists -> put the missing ones -> give the slots back

One thread with an event loop calls the store; no other thread does. prefix_reader.py serves requests. A call owns its slots
until it returns, however long that takes. While the breaker is open, kvkern neither asks nor writes.
"""

from __future__ import annotations

import asyncio
import logging
import random
import threading
import time
from collections import Counter
from collections.abc import Coroutine, Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np

from ..arena.file import Arena
from ..metrics import CacheCounters
from ..policy.base import Use
from ..policy.persist_modes import Persist
from ..tiers.base import Lease
from ..tiers.slot_headers import verify_slots
from .cache_interface import CacheSide, FaultsAsMisses
from .circuit_breaker import CircuitBreaker
from .cost_model import CostModel
from .prefix_reader import PrefixReader
from .presence_cache import PresenceCache
from .store_calls import StoreCalls
from .store_thread import StoreThread
from .stores.base import Interruptible, RemoteError, RemoteStore
from .value_format import outgoing_parts
from .waiting_request import WaitingRequest
from .write_behind import NO_SLOT, PendingWrite, WriteBehind

logger = logging.getLogger("kvkern")

WINDOW_S = 0.05  # seconds that one call should take: a lease grows by so much at a time
FIRST_WINDOW_NBYTES, WINDOW_NBYTES = 32 << 20, (16 << 20, 256 << 20)  # of a call: before the speed is known; limits
RETRY_S = 0.2
INTERRUPT_S = 1.0  # what a call gets to end by itself while the tier is closed


class RemoteTier:
    """Call `start`, then `extend` from any thread, and `close` at the end."""

    def __init__(
        self,
        store: RemoteStore,
        name: str,  # for messages; no secrets
        arena: Arena,
        cache: CacheSide,
        counters: CacheCounters,
        faults: FaultsAsMisses,
        mode: Persist,
        queue_nbytes: int,  # bytes of chunks that may wait to be written
        timeout_s: float,  # of a call
        store_thread: StoreThread | None = None,  # if the store is open already; the tier owns it from `start` on
    ) -> None:
        self._store, self._name, self._arena, self._cache = store, name, arena, cache
        self._store_thread = store_thread or StoreThread(store)
        self._counters, self._faults = counters, faults
        geometry = arena.spec.geometry
        self.breaker = CircuitBreaker(name)
        self.costs = CostModel(geometry.slot_nbytes)
        limit = max(1, queue_nbytes // geometry.slot_nbytes)
        self.spare = 0 if mode is Persist.HOT else min(limit, max(1, arena.spec.num_slots // 8))
        allows = self.breaker.allows_call
        self.outbox = WriteBehind(cache.records, mode, limit, self.costs, counters, allows, self._wake_writers)
        self._loop = self._store_thread.loop
        self._wake = asyncio.Event()
        self._woken = False
        self._tasks: set[asyncio.Task[None]] = set()
        self._calls = StoreCalls(store, self.breaker, counters, timeout_s)
        self.presence = PresenceCache(self.costs)
        self.reader = PrefixReader(
            arena, cache, self._calls, allows, self.costs, self.presence, counters, faults, self._window_chunks,
            lambda: self.outbox.chunk_tokens,
        )  # fmt: skip
        self._lock = threading.Lock()  # of `_closing`: no callback reaches the loop after its end
        self._closing = False
        self._writing = False  # set before chunks leave the outbox

    # -- life ----------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Open the store. If it does not answer, every lookup is a miss until it does.

        Raises ConfigError for a mistake that the user has to correct.
        """
        self._store_thread.open()
        if self._store_thread.open_failure:
            self.breaker.trip(self._store_thread.open_failure)
        try:
            verify_slots(self._arena, np.zeros(1, dtype=np.int64))  # loads numba now, not while a request waits
            self._store_thread.run(self._register())
        except BaseException:
            self._store_thread.close()
            raise
        self._loop.call_soon_threadsafe(self._spawn, self._write())

    async def _register(self) -> None:
        try:
            await self._store.register(self._arena.bytes.data)
        except RemoteError as error:
            self.breaker.trip(error)

    def close(self, drain_s: float = 0.0) -> None:
        """Write waiting chunks for at most `drain_s`. Then wait for calls under way and end the thread.

        A call has INTERRUPT_S to end by itself. Then a store that can is told to end its calls. Any other store ends them
        after the call's timeout: until then it uses the arena's memory.
        """
        if not self._store_thread.alive:
            return
        end = time.monotonic() + drain_s
        while not self.idle and not self.breaker.is_open and time.monotonic() < end:
            time.sleep(0.01)
        with self._lock:
            self._closing = self._calls.closed = True
        try:
            self._store_thread.run(self._finish())
        finally:
            self._store_thread.stop()

    def usage(self) -> dict[str, int | float | str]:
        """Return figures for operators: whether the store works, how much waits, and what moving a chunk costs."""
        measured = {
            "remote_read_ms_per_chunk": self.costs.read_s and 1e3 * self.costs.read_s,
            "remote_write_ms_per_chunk": self.costs.write_s and 1e3 * self.costs.write_s,
            "prefill_tokens_s": self.costs.prefill_tokens_s,
        }
        return {
            "remote": self._name, "remote_works": int(not self.breaker.is_open),
            "remote_waiting_requests": self.reader.num_waiting, "remote_queue_chunks": len(self.outbox),
            **{name: value for name, value in measured.items() if value is not None},
        }  # fmt: skip

    @property
    def idle(self) -> bool:
        """True if no chunk waits to be written and none is being written."""
        return not len(self.outbox) and not self._writing

    async def _finish(self) -> None:
        """Wait for all calls, then close the store. When the last call has ended, nobody uses the memory."""
        self._wake.set()
        while self._tasks:
            _, running = await asyncio.wait(self._tasks, timeout=INTERRUPT_S)
            if running and isinstance(self._store, Interruptible):
                self._store.interrupt()
        left = self.outbox.take(len(self.outbox))
        self.outbox.count_dropped(len(left))
        self._cache.free_departed([entry.slot for entry in left if entry.slot != NO_SLOT])
        await self._close_store()

    async def _close_store(self) -> None:
        with self._faults.are_misses():
            await self._store.close()

    def _spawn(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def note_prefill(self, tokens_s: float, client: int = 0) -> None:
        """Note that an engine computes `tokens_s` prompt tokens per second."""
        self.costs.note_prefill(tokens_s, client)

    def forget_client(self, client: int) -> None:
        """Forget what a client that is gone has noted."""
        self.costs.forget_client(client)

    # -- reading -------------------------------------------------------------------------------------------------------

    def extend(self, lease: Lease, keys: Sequence[bytes], prefix: bool, use: Use) -> Future[Lease]:
        """Return a lease of the chunks of `lease` and those that the store adds. It is done at once if the store adds none."""
        request = WaitingRequest(list(keys), use, prefix, [lease])
        with self._lock:
            if not self._closing and self.reader.admits(request):
                self._loop.call_soon_threadsafe(self._begin, request)
                return request.answer
        request.reply()
        return request.answer

    def _begin(self, request: WaitingRequest) -> None:
        self._spawn(self.reader.serve(request))

    # -- writing -------------------------------------------------------------------------------------------------------

    def _wake_writers(self) -> None:
        """Wake the writer. Called from any thread, and often."""
        with self._lock:
            if not self._woken and not self._closing:
                self._woken = True
                self._loop.call_soon_threadsafe(self._wake.set)

    async def _write(self) -> None:
        while not self._closing:
            await self._wake.wait()
            self._wake.clear()
            self._woken = False
            await self._write_all()

    async def _write_all(self) -> None:
        self._writing = True
        while not self._closing and (entries := self.outbox.take(self._window_chunks(self.costs.write_s))):
            with self._faults.are_misses():
                await self._write_window(entries)
        self._writing = False

    async def _write_window(self, entries: list[PendingWrite]) -> None:
        """Write the entries that the store lacks, then give back all slots and leases."""
        lease = self._cache.lease([entry.key for entry in entries if entry.slot == NO_SLOT], prefix=False)
        owned = {entry.key: entry.slot for entry in entries if entry.slot != NO_SLOT}
        slots = owned | dict(zip(lease.keys, lease.slots, strict=True))
        try:
            self.outbox.count_dropped(len(entries) - len(slots))  # evicted or cleared before their turn came
            keys = sorted(slots, key=lambda key: int(self._cache.records.rows["position"][slots[key]]))
            written = await self._put(keys, slots)
            self._counters.remote_written_chunks += written
        finally:
            self._cache.free_departed(list(owned.values()))
            self._cache.release(lease)

    async def _put(self, keys: list[bytes], slots: dict[bytes, int]) -> int:
        """Write `keys` that the store lacks. Returns how many were written.

        A call that fails is tried once more, a little later. A key that was not answered is not tried again.
        """
        if not self.breaker.allows_call():
            self.outbox.count_dropped(len(keys))
            return 0
        for last in (False, True):
            try:
                there = await self._calls.exists(keys)
                missing = [
                    key for key, is_there in zip(keys, there, strict=True) if not is_there and is_there is not None
                ]
                written = await self._put_missing(missing, slots)
                self.outbox.count_dropped(there.count(None) + len(missing) - written)  # not answered, or no room
                return written
            except RemoteError:
                if last or self.breaker.is_open or self._closing:
                    break
                await asyncio.sleep(RETRY_S * (0.5 + random.random()))
        self.outbox.count_dropped(len(keys))
        return 0

    async def _put_missing(self, keys: list[bytes], slots: dict[bytes, int]) -> int:
        """Write `keys`. Returns how many the store has confirmed. A chunk whose header was rewritten is not written."""
        at = np.array([slots[key] for key in keys], dtype=np.int64)
        values, good = outgoing_parts(self._arena, at, self._cache.records, keys)
        if len(values) < len(keys):
            bad = at[~good]
            self._arena.mark_bad(bad)  # a cached chunk is dropped and counted with the lease of this write
            logger.warning(
                "kvkern: %(chunks)d of %(all_chunks)d chunks are not written to the remote store: %(why)s Check who "
                "may use this cache",
                {
                    "event": "remote_write_refused",
                    "chunks": len(bad),
                    "all_chunks": len(keys),
                    "why": self._cache.records.describe_bad(bad.tolist()),
                },
            )  # fmt: skip
            keys = [key for key, ok in zip(keys, good.tolist(), strict=True) if ok]
        if not keys:
            return 0
        began = time.monotonic()
        taken = await self._calls.put(keys, values)
        written = [key for key, ok in zip(keys, taken, strict=True) if ok]
        namespaces, groups = self._cache.records.rows["namespace"], self._cache.records.rows["group"]
        counts = Counter((bytes(namespaces[slots[key]]), not groups[slots[key]]) for key in written)
        for (namespace, is_first), count in counts.items():
            self._cache.observer.stored("remote", namespace, 0, count, count * is_first)
        self.presence.note_written(written)
        if written:
            self.costs.note_write(len(written), time.monotonic() - began)
        return len(written)

    # -- reading and writing -------------------------------------------------------------------------------------------

    def _window_chunks(
        self,
        chunk_s: float | None,  # seconds to move one chunk; None: not known
    ) -> int:
        """Return how many chunks to move in one call: as many as take WINDOW_S, within limits."""
        slot_nbytes = self._arena.spec.geometry.slot_nbytes
        least, most = (max(1, nbytes // slot_nbytes) for nbytes in WINDOW_NBYTES)
        wanted = FIRST_WINDOW_NBYTES // slot_nbytes if chunk_s is None else int(WINDOW_S / max(chunk_s, 1e-9))
        return min(max(wanted, least), most)
